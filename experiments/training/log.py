"""A run's log: JSON lines and TensorBoard events, one record an epoch."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from experiments.reporting import figures as plots
from experiments.runtime import files

TENSORBOARD = ("scalars", "full")


@dataclasses.dataclass(frozen=True)
class Logging:
    """What a run logs beyond its scalars, at every evaluation.

    Attributes:
      class_batches: training batches on which to measure what the perturbations do to every class.
      tensorboard: scalars, or full: with histograms (of weights, and of what is logged by class)
        and the figure of the classes' accuracy.

    Raises:
      ValueError: naming the flag that is out of range.
    """

    class_batches: int = 0
    tensorboard: str = "scalars"

    def __post_init__(self):
        if self.class_batches < 0:
            raise ValueError(f"--class_geometry_batches must be >= 0, got {self.class_batches}")
        if self.tensorboard not in TENSORBOARD:
            known = ", ".join(TENSORBOARD)
            raise ValueError(f"--tensorboard must be one of {known}, got {self.tensorboard!r}")


class RunLog:
    """Writes records to `metrics.jsonl` and TensorBoard events; without a folder, nowhere.

    A record holds scalars, and vectors with a number a class.

    What an earlier, interrupted run left in the folder is replaced by `rows`: those of its records
    that the checkpoint holds from which this run goes on. So no epoch is there twice or not at all,
    but for the weights' histograms and the figures, which begin where the run goes on.

    Attributes:
      rows: all records so far, as plain values.
    """

    def __init__(
        self,
        folder: pathlib.Path | None,
        rows: Sequence[Mapping[str, Any]] = (),
        logging: Logging = Logging(),
    ):
        self._full = logging.tensorboard == "full"
        self.rows = [dict(row) for row in rows]
        self._folder = folder
        self._lines = self._events = None

    def __enter__(self) -> "RunLog":
        if self._folder is not None:
            path = self._folder / "metrics.jsonl"
            files.write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
            for old in self._folder.glob("events.out.tfevents.*"):
                old.unlink()
            self._lines = path.open("a", encoding="utf-8")
            self._events = SummaryWriter(str(self._folder), flush_secs=30)
            for row in self.rows:
                self._add_events(row)
        return self

    def __exit__(self, *exception) -> None:
        if self._lines is not None:
            self._lines.close()
            self._events.close()

    def write(
        self,
        step: int,
        values: Mapping[str, Any],
        weights: Any = None,
        class_accuracy: np.ndarray | None = None,
    ) -> None:
        """Adds one record.

        Args:
          step: of the run.
          values: scalars and vectors by name.
          weights: parameters, whose histograms go to TensorBoard alone.
          class_accuracy: [C], whose figure does.
        """
        row = files.plain({**values, "step": step})
        self.rows.append(row)
        if self._lines is not None:
            self._lines.write(json.dumps(row) + "\n")
            self._lines.flush()
            self._add_events(row)
            for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
                name = "weights/" + "/".join(str(getattr(key, "key", key)) for key in path)
                self._add_histogram(name, leaf, step)
            if class_accuracy is not None:
                self._add_histogram("evaluation/class_accuracy", class_accuracy, step)
                figure = plots.class_accuracy_figure(class_accuracy)
                self._events.add_figure("evaluation/class_accuracy", figure, step)

    def _add_events(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, list):
                if self._full:
                    self._add_histogram(name, value, row["step"])
            elif name not in ("step", "epoch") and value is not None:  # None: an empty group
                self._events.add_scalar(_tag(name), value, row["step"])

    def _add_histogram(self, name: str, values: Any, step: int) -> None:
        values = np.asarray(values, np.float64).ravel()
        values = values[np.isfinite(values)]  # absent classes are NaN
        if values.size:
            self._events.add_histogram(_tag(name), values, step)


def _tag(name: str) -> str:
    # TensorBoard takes no other characters; domains are called +90% and the like.
    return re.sub(r"[^\w./-]", "_", name)
