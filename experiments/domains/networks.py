"""The networks of domain generalization, each trained without some domains.

A finished network leaves `training.json`: the accuracy on every domain at every checkpoint, from
which `selection` chooses afterwards.
"""

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments.domains.data import IN, OUT, DomainSource, DomainTask
from experiments.domains.selection import holdout_accuracy
from experiments.domains.settings import DomainSettings
from experiments.methods.names import MIXUP, parse
from experiments.runtime import files
from experiments.runtime.progress import RunProgress
from experiments.runtime.schema import ANY, NUMBER, SHARE, TEXT, WHOLE, YES_OR_NO, Kind
from experiments.training import run
from experiments.training.folder import DATA, Names, check_inside, finished_result
from experiments.training.program import Program, Programs
from experiments.training.saving import Saving
from lpa_jax import penalties
from lpa_jax.training.loop import EpochRecord, NonFiniteLossError
from lpa_jax.training.step import TrainState

# Not the names of results: a result is selected from several networks.
NAMES = Names(config="training_config.json", result="training.json")


class Training(NamedTuple):
    """What one network is trained with.

    Attributes:
      method: its name.
      options: its options.
      held_out: the domains that it is not trained on, in the order of the data set.
      seed: of its parameters, its holdouts and the order of its data.
    """

    method: str
    options: Mapping[str, Any]
    held_out: tuple[str, ...]
    seed: int

    def __str__(self) -> str:
        return f"{self.method} without {','.join(self.held_out)} seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class DomainJob(run.Job):
    """A training as it is run.

    Attributes:
      training: what the network is trained with.
      program: the compiled method.
      task: the data.
      config: everything that decides the result, as plain values.
      names: of its files.
    """

    training: Training
    program: Program
    task: DomainTask
    config: Mapping[str, Any]
    names: Names

    @property
    def seed(self) -> int:
        """Of the initial parameters and of the order of the data."""
        return self.training.seed

    def configuration(self) -> Mapping[str, Any]:
        """Everything that decides the result, as plain values."""
        return self.config

    def evaluation(self, found: Mapping[str, Any]) -> dict[str, float]:
        """Accuracy by PART/DOMAIN."""
        return {name: metrics["accuracy"] for name, metrics in found.items()}

    def row(self, state: TrainState, record: EpochRecord) -> dict[str, Any]:
        """The line of the log at a checkpoint."""
        row = {f"train/{name}": value for name, value in record.train.items()}
        row["train/learning_rate"] = self.program.learning_rate(record.step - 1)
        row |= record.evaluation | run.adapted_radii(state)
        return {"step": record.step, **row, "examples_per_second": record.examples_per_second}

    def score(self, evaluation: Mapping[str, float]) -> float:
        """The mean accuracy on the holdouts of the training domains."""
        return holdout_accuracy(_record(evaluation), self.training.held_out)

    def result(self, rows: Sequence[Mapping[str, Any]], evaluation: Any) -> dict[str, Any]:
        """The accuracies at every checkpoint: see `selection.Record`."""
        return {"records": [_record(row) for row in rows], "diverged": None}

    def diverged(self, error: NonFiniteLossError) -> dict[str, Any]:
        """No records."""
        return {"records": [], "diverged": str(error)}


class Trainings:
    """Trains the networks of one experiment, each once; finished ones are read from their files.

    Args:
      settings: settings of all trainings; also an attribute.
      source: the domains; also an attribute.
      folder: folder of all trainings.
      layer: injection point of perturbations that name none.
      look_at_held_out: whether records hold the accuracy on held-out domains and on training
        images; without it, held-out domains are never opened.
      saving: when to save checkpoints, and how many to keep.
      should_stop: see `run.run`.
    """

    def __init__(
        self,
        settings: DomainSettings,
        source: DomainSource,
        folder: pathlib.Path,
        layer: str | None = None,
        look_at_held_out: bool = True,
        saving: Saving = run.DEFAULT_SAVING,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self.settings, self.source, self._folder = settings, source, folder
        self._look_at_held_out, self._programs = look_at_held_out, Programs(settings, layer)
        self._saving, self._should_stop = saving, should_stop
        self._outcomes: dict[pathlib.Path, dict[str, Any]] = {}

    def program(self, training: Training) -> Program:
        """The program of a training; those that differ in numbers alone share the compilation.

        Raises:
          ValueError: a flag or option that does not fit.
        """
        num_domains = len(self.source.names) - len(training.held_out)
        _check_domains(training, self.settings, num_domains, len(self.source.names))
        return self._programs.program(training.method, training.options, self._task(training))

    def place(self, training: Training) -> pathlib.Path:
        """Folder of a training."""
        text = json.dumps(files.plain(training.options), sort_keys=True)
        options_key = f"options_{zlib.crc32(text.encode()):08x}"
        domains = f"without_{','.join(training.held_out)}"
        return self._folder / training.method / domains / f"seed_{training.seed}" / options_key

    def finished(self, training: Training) -> dict[str, Any] | None:
        """The outcome of a finished training; None if it is missing or incomplete.

        Raises:
          ValueError: its folder holds one with other settings.
        """
        config = self._configuration(training)
        return finished_result(self.place(training), config, self._names(training))

    def run(self, training: Training, progress: RunProgress) -> dict[str, Any]:
        """Trains a network, unless it is finished, and writes its records.

        Returns:
          "records" (see `selection.Record`; empty if it diverged) and "seconds".

        Raises:
          As `run.run`.
        """
        place = self.place(training)
        # Not always read from its file: other hosts than the first may not see it yet.
        if place not in self._outcomes:
            check_inside(self._folder, place)
            is_new = self.finished(training) is None
            if is_new:
                progress.start(str(training))
            outcome = run.run(
                self.job(training),
                place,
                on_epoch=progress.epoch,
                on_step=progress.step,
                saving=self._saving,
                should_stop=self._should_stop,
                say=progress.say,
            )
            if is_new:
                progress.finish(_summary(outcome, training))
            self._outcomes[place] = outcome
        return self._outcomes[place]

    def job(self, training: Training) -> DomainJob:
        """The training as it is run."""
        return DomainJob(
            training,
            self.program(training),
            self._task(training),
            self._configuration(training),
            self._names(training),
        )

    def _names(self, training: Training) -> Names:
        """The names of its files, and what `training.json` holds: records, unless it diverged."""
        domains = self.source.names
        unseen = [name for name in domains if name not in training.held_out]
        inside, outside = (domains, domains) if self._look_at_held_out else ((), unseen)
        record = {
            "step": WHOLE,
            IN: dict.fromkeys(inside, SHARE),
            OUT: dict.fromkeys(outside, SHARE),
        }
        common = {"complete": YES_OR_NO, "seconds": NUMBER, ...: ANY}
        finished = common | {"records": [record, ...], "diverged": None}
        none = Kind("empty", lambda value: value == [])
        diverged = common | {"records": none, "diverged": TEXT}
        return NAMES._replace(schema=(finished, diverged))

    def _task(self, training: Training) -> DomainTask:
        return self.source.task(training.seed, training.held_out, self._look_at_held_out)

    def _configuration(self, training: Training) -> dict[str, Any]:
        return files.plain(
            {
                **training._asdict(),
                "settings": self.settings.as_dict(),
                "looks_at_held_out": self._look_at_held_out,
                DATA: self.source.digests,
            }
        )


def _check_domains(
    training: Training, settings: DomainSettings, num_domains: int, num_sources: int
) -> None:
    names = [part.name for part in parse(training.method)]
    compared = [name for name in names if name in penalties.names()
                and "num_domains" in penalties.options(name)]  # fmt: skip
    # Pairs of three domains leave one; such methods are trained on it as in DomainBed.
    if compared and num_domains < 2 and num_sources < 3:
        raise ValueError(
            f"--methods: {compared[0]} in {training.method!r} compares training domains, but only "
            f"{num_domains} of {settings.dataset} would be trained on"
        )
    batch_size = settings.with_options(training.options).batch_size
    if batch_size % jax.device_count() and MIXUP in names:
        raise ValueError(
            f"--methods: mixup mixes domains, so that --batch_size={batch_size} must be a multiple "
            f"of {jax.device_count()} devices"
        )
    if num_domains < 1:
        raise ValueError(f"--leave_two_out: {settings.dataset} has no third domain to train on")


def _record(row: Mapping[str, float]) -> dict[str, Any]:
    """The accuracies in a line of the log: see `selection.Record`."""
    parts = {
        part: {
            key.removeprefix(f"{part}/"): value
            for key, value in row.items()
            if key.startswith(f"{part}/")
        }
        for part in (IN, OUT)
    }
    return {"step": row.get("step"), **parts}


def _summary(outcome: Mapping[str, Any], training: Training) -> str:
    if outcome["diverged"]:
        return outcome["diverged"]
    accuracy = holdout_accuracy(outcome["records"][-1], training.held_out)
    return f"validation accuracy {100 * accuracy:.2f} %"
