"""Networks of the domain generalization protocol, each trained on some domains and seen on all.

A finished network leaves `training.json`: the accuracy of every domain at every checkpoint, from
which `domain_selection` chooses afterwards. An interrupted one goes on from its last checkpoint.
"""

import dataclasses
import functools
import json
import pathlib
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.domains.program import Program, needs_counts
from experiments.domains.selection import holdout_accuracy
from experiments.domains.settings import DomainSettings, DomainSource
from experiments.methods.build import traceable
from experiments.runtime import files
from experiments.runtime.progress import RunProgress
from experiments.training import run_rows
from experiments.training.folder import Names, RunFolder, check_inside, finished_result
from experiments.training.log import RunLog
from experiments.training.saving import Saving
from lpa_jax import data, metrics, multihost, parallel
from lpa_jax.data.prefetch import Prefetched
from lpa_jax.interrupts import InterruptedRunError
from lpa_jax.training import loop as trainer

# Not those of results: what a reader of results counts is `select`ed from several trainings.
NAMES = Names(config="training_config.json", result="training.json")
DEFAULT_SAVING = Saving()
# Accuracies that a record may hold: by part of a domain, whose name follows.
IN, OUT = "in", "out"
# Activations of larger batches fall out of the cache of a CPU.
_MOST_EVALUATED = 500


class Network(NamedTuple):
    """What one network is trained with.

    Attributes:
      method: its name.
      options: its options.
      held_out: the domains that it is not trained on, in the order of the set.
      seed: of its parameters, its holdouts and the order of its data.
    """

    method: str
    options: Mapping[str, Any]
    held_out: tuple[str, ...]
    seed: int

    def __str__(self) -> str:
        return f"{self.method} without {','.join(self.held_out)} seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class _Intervals:
    """Training batches whose epoch is the stretch between two evaluations."""

    batches: data.DomainBatches | data.Prefetched
    steps_per_epoch: int

    def __getitem__(self, step: int) -> Mapping[str, np.ndarray]:
        return self.batches[step]


class Trainings:
    """Trains networks of one experiment, each once: finished ones are read from their files.

    Args:
      settings: settings of all trainings.
      source: the domains.
      folder: where the trainings stand.
      layer: where perturbations without a layer of their own stand.
      look_at_held_out: whether records hold the accuracy on held-out domains and on training
        images; without, held-out domains are never opened.
      saving: when to save checkpoints, and which remain.
      should_stop: asked after every step and before every evaluation batch; True saves and raises.
        Several hosts must get the same answer at the same time, as `Interrupts` gives it.
    """

    def __init__(
        self,
        settings: DomainSettings,
        source: DomainSource,
        folder: pathlib.Path,
        layer: str | None = None,
        look_at_held_out: bool = True,
        saving: Saving = DEFAULT_SAVING,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self._settings, self._source, self._folder = settings, source, folder
        self._layer, self._look_at_held_out = layer, look_at_held_out
        self._saving, self._should_stop = saving, should_stop
        self._outcomes: dict[pathlib.Path, dict[str, Any]] = {}
        self._programs: dict[tuple, Program] = {}
        # The data of one seed are in use at a time.
        self._splits = functools.lru_cache(maxsize=1)(source.splits)
        self._batches = functools.lru_cache(maxsize=1)(self._evaluation_batches)

    def program(self, network: Network) -> Program:
        """The program of a training; those that differ in numbers alone share one.

        Raises:
          ValueError: naming the flag or option that does not fit.
        """
        method, options, held_out, seed = network
        counts = None
        if needs_counts(method, options):
            counts = self._source.counts(seed, held_out)
        num_domains = len(self._source.names) - len(held_out)
        numbers = traceable(method, options)
        structure = {name: value for name, value in options.items() if name not in numbers}
        key = (method, numbers, _text(structure), num_domains, counts)
        if key not in self._programs:
            self._programs[key] = Program(
                method,
                options,
                self._settings,
                self._source,
                num_domains,
                counts or (1,) * self._source.num_classes,
                self._layer,
            )
        return self._programs[key]

    def place(self, network: Network) -> pathlib.Path:
        """Folder of a training."""
        options_key = f"options_{zlib.crc32(_text(network.options).encode()):08x}"
        domains = f"without_{','.join(network.held_out)}"
        return self._folder / network.method / domains / f"seed_{network.seed}" / options_key

    def finished(
        self, network: Network, say: Callable[[str], None] = lambda line: None
    ) -> dict[str, Any] | None:
        """A training that is there, or None if it is missing or incomplete.

        `say` gets a line for a file that is there and cannot be read.

        Raises:
          ValueError: its folder holds one with other settings.
        """
        return finished_result(self.place(network), self._configuration(network), NAMES, say)

    def run(
        self, network: Network, progress: RunProgress, may_diverge: bool = False
    ) -> dict[str, Any]:
        """Trains a network, unless that is done, and writes its records.

        Returns:
          "records" (see `domain_selection.Record`; none if it diverged) and "seconds".

        Raises:
          ValueError: the folder holds another training.
          trainer.NonFiniteLossError: the loss diverged, and that may not be.
          CheckpointError: no room to save, or no intact checkpoint to go on
          from.
          hosts.DifferingHostsError: processes would not go on from the same.
          InterruptedRunError: it was asked to stop; the same call goes on from there.
        """
        place = self.place(network)
        # Not always from its file: other hosts than the first may not see it yet.
        if place not in self._outcomes:
            check_inside(self._folder, place)
            folder = RunFolder(place, self._configuration(network), self._saving, NAMES)
            self._outcomes[place] = folder.result(progress.say) or self._run(
                network, place, folder, progress, may_diverge
            )
        return self._outcomes[place]

    def _run(self, network, place, folder, progress, may_diverge) -> dict[str, Any]:
        if self._should_stop():
            raise InterruptedRunError("stopped before a network was begun")
        program = self.program(network)
        progress.start(str(network))
        restored = folder.begin(program.init(network.seed), progress.say)
        started = time.perf_counter() - restored.notes.get("seconds", 0.0)
        log_place = place if multihost.is_first_host() else None
        with RunLog(log_place, restored.notes.get("rows", ())) as log:

            def notes():
                return {"rows": log.rows, "seconds": time.perf_counter() - started}

            def save(state, totals):
                folder.save(state, totals, notes())

            def score(state, accuracy):
                folder.score(state, accuracy, notes())

            try:
                self._train(program, network, restored, save, score, log, progress)
                records, diverged = [_record(row) for row in log.rows], None
                last = holdout_accuracy(records[-1], network.held_out)
                progress.finish(f"validation accuracy {100 * last:.2f} %")
            except trainer.NonFiniteLossError as error:
                if not may_diverge:
                    raise
                records, diverged = [], str(error)
                progress.finish(diverged)
        seconds = time.perf_counter() - started
        return folder.finish(
            {"complete": True, "records": records, "diverged": diverged, "seconds": seconds}
        )

    def _configuration(self, network: Network) -> dict[str, Any]:
        return files.plain(
            {
                **network._asdict(),
                "settings": self._settings.as_dict(),
                "looks_at_held_out": self._look_at_held_out,
            }
        )

    def _train(self, program, network, restored, save, score, log, progress) -> None:
        """Writes one row of the log a checkpoint; saves and raises if asked to stop."""
        _, options, held_out, seed = network
        settings = self._settings.with_options(options)
        inside = [
            split.inside for name, split in self._splits(seed).items() if name not in held_out
        ]
        batches = self._ready(
            data.domain_batches(
                inside, seed, settings.batch_size, host_slice=multihost.host_slice()
            )
        )
        evaluated = {
            key: batches
            for key, batches in self._batches(seed).items()
            if self._look_at_held_out or (key[0] == OUT and key[1] not in held_out)
        }
        evaluate, step = program.evaluation(options), restored.step
        intervals = _Intervals(batches, settings.evaluate_every)
        with Prefetched(intervals, program.place) as intervals:
            for state, record in trainer.train(
                restored.state,
                program.stages(options),
                intervals,
                settings.intervals,
                evaluate=lambda state: _accuracies(evaluate, state, evaluated, self._should_stop),
                totals=restored.totals,
                save=save,
                should_save=self._saving.schedule(settings.evaluate_every, settings.train_steps),
                should_stop=self._should_stop,
                watch=lambda done, totals: progress.step(
                    done, done / settings.evaluate_every, totals
                ),
                block_every_step=parallel.must_block(),
            ):
                step = record.step
                row = _row(record)
                log.write(step, row | run_rows.adapted_radii(state))
                score(state, holdout_accuracy(_record(row), held_out))
                progress.epoch(record)
        if step < settings.train_steps:
            raise InterruptedRunError("stopped, and what was done is saved")

    def _evaluation_batches(self, seed: int) -> dict[tuple[str, str], Sequence[Any]]:
        splits = self._splits(seed)
        parts = {
            (part, name): dataset
            for name, split in splits.items()
            for part, dataset in ((IN, split.inside), (OUT, split.outside))
        }
        size = evaluation_batch_size([len(dataset) for dataset in parts.values()])
        return {
            key: self._ready(
                data.evaluation_batches(dataset, size, host_slice=multihost.host_slice())
            )
            for key, dataset in parts.items()
        }

    def _ready(self, batches):
        """Those of images on disk are read in threads while the device computes."""
        return data.read_ahead(batches) if self._source.on_disk else batches


def evaluation_batch_size(sizes: Sequence[int], devices: int | None = None) -> int:
    """The batch size of at most 500 that wastes fewest evaluations on padding.

    Args:
      sizes: of the sets that are evaluated one after the other.
      devices: what the batch size is a multiple of; all devices if None.

    >>> evaluation_batch_size([667, 166], devices=1)
    167
    """
    devices = jax.device_count() if devices is None else devices
    largest = -(-min(max(sizes), _MOST_EVALUATED) // devices) * devices
    candidates = range(largest, max(largest // 4, devices - 1), -devices)
    return min(candidates, key=lambda batch: sum(-(-size // batch) * batch for size in sizes))


def _accuracies(evaluate, state, batches, should_stop) -> dict[tuple[str, str], float] | None:
    """Accuracy by (part, domain); the host waits once, for all of them. None if asked to stop."""
    totals = {}
    for key, of in batches.items():
        for number in range(len(of)):
            if should_stop():
                return None
            pair = evaluate(state, of[number])
            totals[key] = metrics.add(totals[key], pair) if key in totals else pair
    return metrics.compute(totals)


def _row(record: trainer.EpochRecord) -> dict[str, float]:
    """A row of the log."""
    row = {f"train/{name}": value for name, value in record.train.items()}
    row |= {f"{part}/{name}": value for (part, name), value in record.evaluation.items()}
    return {"step": record.step, **row, "examples_per_second": record.examples_per_second}


def _record(row: Mapping[str, float]) -> dict[str, Any]:
    """What selection reads of a row of the log."""
    parts = {
        part: {
            key.removeprefix(f"{part}/"): value
            for key, value in row.items()
            if key.startswith(f"{part}/")
        }
        for part in (IN, OUT)
    }
    return {"step": row["step"], **parts}


def _text(options: Mapping[str, Any]) -> str:
    return json.dumps(files.plain(options), sort_keys=True)
