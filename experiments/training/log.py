"""The log of a run: JSON lines and TensorBoard events, one record for each epoch."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams as hparams_of

from experiments.runtime import fields, files
from experiments.runtime.fields import setting
from experiments.training.folder import LOGS


@dataclasses.dataclass(frozen=True)
class Logging:
    """What a run logs in addition to its scalars, at every evaluation.

    Raises:
      ValueError: naming the flag that is out of bounds.
    """

    GROUP: ClassVar[str] = "saving"

    class_batches: int = setting(
        0,
        "Training batches on which every evaluation measures what the perturbations do to each "
        "class (norm ratio, cosine, loss change, sign, radius), for figures over epochs.",
        flag="class_geometry_batches",
        low=0,
        high=10**6,
    )
    tensorboard: str = setting(
        "scalars",
        "full adds histograms of the weights and of what is logged by class, and a figure of the "
        "accuracy of each class, at every evaluation.",
        allowed=("scalars", "full"),
    )

    def __post_init__(self):
        fields.check(self)


class RunLog:
    """Writes records to `metrics.jsonl` and as TensorBoard events.

    A record holds scalars, and vectors with one number for each class.

    A run that resumes replaces what it left in the folder by `rows`, the records in its checkpoint.
    So every epoch is logged exactly once. Only the histograms of weights and the figures of the
    epochs before the checkpoint are lost.

    Args:
      folder: of the run; None writes nothing.
      rows: records of earlier epochs.
      logging: what to log.

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
            for old in (*self._folder.glob("events.out.tfevents.*"), self._folder / LOGS):
                old.unlink(missing_ok=True)
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
          class_accuracy: [C], whose figure goes to TensorBoard alone.
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
                figure = _class_accuracy_figure(class_accuracy)
                self._events.add_figure("evaluation/class_accuracy", figure, step)

    def finish(self, hparams: Mapping[str, Any], accuracy: float | None) -> None:
        """Adds what TensorBoard's HPARAMS compares: the options and the final accuracy."""
        if self._events is None or accuracy is None:
            return
        for summary in hparams_of(dict(hparams), {"final/accuracy": accuracy}):
            self._events.file_writer.add_summary(summary)
        self._events.add_scalar("final/accuracy", accuracy, self.rows[-1]["step"])

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


def _class_accuracy_figure(accuracy: np.ndarray) -> Figure:
    """One model's accuracy by class, [C]."""
    figure = Figure(figsize=(max(4.0, min(12.0, 0.35 * len(accuracy))), 2.6), layout="constrained")
    axis = figure.subplots()
    axis.plot(range(len(accuracy)), 100 * accuracy, "o", color="#0072B2")
    axis.set(xlabel="class", ylabel="accuracy %", ylim=(0, 100))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(color="#e6e6e6")
    return figure


def _tag(name: str) -> str:
    # TensorBoard takes no other characters; domains are called +90% and the like.
    return re.sub(r"[^\w./-]", "_", name)
