"""How often runs save checkpoints, and which checkpoints remain."""

import dataclasses
import re
from collections.abc import Callable
from typing import ClassVar

from experiments.runtime import fields
from experiments.runtime.fields import setting
from lpa_jax.checkpoints import checkpoints

_INTERVAL = re.compile(r"(\d+(?:\.\d+)?)(step|epoch|minute)s?")


@dataclasses.dataclass(frozen=True)
class Saving:
    """When to save, and how many checkpoints to keep; an interrupted run always saves one.

    Raises:
      ValueError: naming the flag that is out of bounds.
    """

    GROUP: ClassVar[str] = "saving"

    every: str = setting(
        "5minutes",
        "Interval between checkpoints: minutes, epochs or steps, such as 5minutes, 2epochs or "
        "200steps; with never, only a run that is interrupted saves one.",
        flag="checkpoint_every",
    )
    keep: int = setting(
        2,
        "Number of newest checkpoints to keep, in addition to the best one.",
        flag="keep_checkpoints",
        low=1,
        high=10**6,
    )
    keep_finished: bool = setting(
        False,
        "Keep the last and the best checkpoint of a finished run, to have its weights.",
        flag="keep_finished_checkpoints",
    )

    def __post_init__(self):
        fields.check(self)
        if self.every != "never":
            number, unit = self._interval()
            if not 0 < number <= fields.MOST or (unit != "minute" and number % 1):
                raise ValueError(_refusal(self.every))

    def schedule(self, steps_per_epoch: int, total_steps: int) -> Callable[[int], bool]:
        """Steps completed -> whether to save, for `trainer.train`.

        >>> due = Saving("2epochs", keep_finished=True).schedule(3, total_steps=9)
        >>> [step for step in range(1, 10) if due(step)]
        [6, 9]
        """
        due = self._due(steps_per_epoch)
        return lambda step: due(step) or (self.keep_finished and step == total_steps)

    def _due(self, steps_per_epoch: int) -> Callable[[int], bool]:
        if self.every == "never":
            return lambda step: False
        number, unit = self._interval()
        if unit == "minute":
            return checkpoints.every_seconds(60 * number)
        return checkpoints.every_steps(int(number) * (steps_per_epoch if unit == "epoch" else 1))

    def _interval(self) -> tuple[float, str]:
        match = _INTERVAL.fullmatch(self.every)
        if match is None:
            raise ValueError(_refusal(self.every))
        return float(match[1]), match[2]


def _refusal(every: str) -> str:
    return (
        "--checkpoint_every must be a positive number of minutes, epochs or steps, such as "
        f"5minutes or 2epochs, or never, got {every!r}"
    )
