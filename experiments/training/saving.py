"""How often runs save checkpoints, and what remains of them."""

import dataclasses
import re
from collections.abc import Callable

from lpa_jax.checkpoints import checkpoints as checkpoint

_INTERVAL = re.compile(r"(\d+(?:\.\d+)?)(step|epoch|minute)s?")


@dataclasses.dataclass(frozen=True)
class Saving:
    """When and how many checkpoints; a run that is interrupted saves one in any case.

    Attributes:
      every: the interval, such as 5minutes, 2epochs or 200steps, or never.
      keep: newest checkpoints that are kept while a run lasts, besides the best.
      keep_finished: whether the last and the best outlive the run.

    Raises:
      ValueError: naming the flag that is out of range.
    """

    every: str = "5minutes"
    keep: int = 2
    keep_finished: bool = False

    def __post_init__(self):
        if self.every != "never":
            number, unit = self._interval()
            if not number > 0 or (unit != "minute" and number != int(number)):
                raise ValueError(_refusal(self.every))
        if self.keep < 1:
            raise ValueError(f"--keep_checkpoints must be >= 1, got {self.keep}")

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
            return checkpoint.every_seconds(60 * number)
        return checkpoint.every_steps(int(number) * (steps_per_epoch if unit == "epoch" else 1))

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
