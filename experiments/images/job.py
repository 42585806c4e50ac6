"""A classification run: what its configuration, its log and its result hold."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.images.data import ImageTask
from experiments.runtime import files
from experiments.runtime.schema import SHARE, WHOLE
from experiments.training.folder import CURVE, DATA, RESULT_SCHEMA, SHARES, Names
from experiments.training.program import Program
from experiments.training.run import Job, adapted_radii
from lpa_jax import data, metrics
from lpa_jax.training.loop import EpochRecord
from lpa_jax.training.step import TrainState

_RESULT = RESULT_SCHEMA | {
    "seed": WHOLE,
    "accuracy": SHARE,
    "per_class_accuracy": [(SHARE, None)],
    "group_accuracy": SHARES,
    "train_counts": [WHOLE],
    "curve": CURVE,
}


@dataclasses.dataclass(frozen=True)
class ImageJob(Job):
    """A method on a task with a seed.

    Attributes:
      program: the compiled method.
      task: the data.
      seed: of the initial parameters and of the order of the data.
      class_batches: training batches on which every evaluation measures what the perturbations do
        to each class.
      measure_effects: whether every evaluation measures what the perturbations do by sign group.
    """

    program: Program
    task: ImageTask
    seed: int
    class_batches: int = 0
    measure_effects: bool = True
    names = Names(schema=_RESULT)

    def configuration(self) -> dict[str, Any]:
        """Everything that decides the result, as plain values."""
        settings = self.program.settings.as_dict()
        for folder in ("data_dir", "image_root"):
            settings.pop(folder)
        return files.plain(
            {
                "method": self.program.method,
                "seed": self.seed,
                "options": self.program.options,
                "settings": settings,
                "train_counts": self.task.counts,
                DATA: self.task.digests,
            }
        )

    def evaluation(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics of the one evaluation set."""
        return found["evaluation"]

    def row(self, state: TrainState, record: EpochRecord) -> dict[str, Any]:
        """The line of the log after an epoch."""
        row = {"epoch": record.epoch, "step": record.step}
        row |= {f"train/{name}": value for name, value in record.train.items()}
        row["train/learning_rate"] = self.program.learning_rate(record.step - 1)
        if record.evaluation is not None:
            for name in ("loss", "accuracy"):
                row[f"evaluation/{name}"] = record.evaluation[name]
            row |= {f"evaluation/{k}": v for k, v in self._groups(record.evaluation).items()}
            row |= self._effects(state) | adapted_radii(state)
        return row | {"examples_per_second": record.examples_per_second}

    def score(self, evaluation: Mapping[str, Any]) -> float:
        """The accuracy by which the best checkpoint is chosen."""
        return evaluation["accuracy"]

    def result(
        self, rows: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Final accuracy, also by class and by group of classes, and the curve."""
        per_class = np.asarray(evaluation["per_class_accuracy"])
        return {
            "method": self.program.method,
            "seed": self.seed,
            "evaluated_on": self.program.settings.evaluate_on,
            "train_counts": self.task.counts,
            "accuracy": evaluation["accuracy"],
            "loss": evaluation["loss"],
            "per_class_accuracy": per_class,
            "group_accuracy": self._groups(evaluation),
            "curve": rows,
        }

    def _groups(self, evaluation: Mapping[str, Any]) -> dict[str, float]:
        """Mean accuracy of the classes with many, medium and few training images."""
        per_class = np.asarray(evaluation["per_class_accuracy"])
        groups = shot_groups(self.task.counts)
        return {name: float(np.nanmean(per_class[own])) for name, own in groups.items()}

    def _effects(self, state: TrainState) -> dict[str, Any]:
        """What the perturbations do by sign group, on one batch, and to every class, on several."""
        if not (self.measure_effects and self.program.has_effects):
            return {}
        # The same batches for all hosts, not a host's share of them.
        batches = data.batches(self.task.train, self.seed, self.program.settings.batch_size)
        effect = metrics.compute(self.program.effect(state, batches[0]))
        found = {f"effect/{name}": value for name, value in effect.items()}
        total = None
        for step in range(min(self.class_batches, batches.steps_per_epoch)):
            pairs = self.program.classes(state, batches[step])
            total = pairs if total is None else metrics.add(total, pairs)
        for layer, geometry in (total or {}).items():
            values = metrics.compute(geometry)
            found |= {f"classes/{layer}/{name}": value for name, value in values.items()}
        return found


def shot_groups(counts: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Many/medium/few classes by the usual thresholds, by thirds if one group would be empty.

    Classes of equal size have no groups.

    >>> shot_groups((50, 50))
    {}
    """
    if len(set(counts)) == 1:
        return {}
    groups = metrics.shot_groups(counts)
    if all(members.any() for members in groups.values()):
        return groups
    return metrics.shot_groups_by_thirds(counts)
