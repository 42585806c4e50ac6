"""Runs of the comparison: a method, a seed and a test domain, with the networks that decide it."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.domains import selection
from experiments.domains.networks import Training, Trainings
from experiments.domains.selection import Selected, Trained
from experiments.domains.settings import DomainSettings
from experiments.runtime import files, hosts
from experiments.runtime.progress import RunProgress
from experiments.runtime.schema import ANY, SHARE, TEXT, WHOLE
from experiments.training import flags as run_flags
from experiments.training import folder
from lpa_jax.training.interrupts import Interrupts
from lpa_jax.training.loop import NonFiniteLossError

NAMES = folder.Names(
    schema=folder.RESULT_SCHEMA
    | {
        "method": TEXT,
        "seed": WHOLE,
        "test_domain": TEXT,
        "accuracy": SHARE,
        "selections": folder.SHARES,
        "selected": {...: {"tied?": WHOLE, ...: ANY}},
    }
)


class Run(NamedTuple):
    """One line of the result.

    Attributes:
      method: its name.
      seed: of the run.
      test: the test domain.
      draws: options, one set for each draw of hyperparameters.
    """

    method: str
    seed: int
    test: str
    draws: tuple[Mapping[str, Any], ...]

    def __str__(self) -> str:
        return f"{self.method} without {self.test} seed {self.seed}"

    def folder(self, workdir: pathlib.Path) -> pathlib.Path:
        """Folder of its result."""
        return workdir / "runs" / self.method / f"test_{self.test}" / f"seed_{self.seed}"

    def trainings(self, draw: int, pairs_of: Sequence[str] = ()) -> Iterator[Training]:
        """The networks of a draw: without the test domain, and without each pair with it.

        Args:
          draw: number of the draw.
          pairs_of: all domains in the order of the data set; empty: no pairs.
        """
        options = self.draws[draw]
        yield Training(self.method, options, (self.test,), self.seed)
        for other in pairs_of:
            if other != self.test:
                # In the set's order, so that both domains of a pair share the network.
                pair = tuple(domain for domain in pairs_of if domain in (self.test, other))
                yield Training(self.method, options, pair, self.seed)

    def configuration(self, settings: DomainSettings, digests: Mapping[str, str]) -> dict[str, Any]:
        """Everything that decides the result, as plain values."""
        config = {
            "method": self.method,
            "seed": self.seed,
            "test_domain": self.test,
            "options": self.draws[0] if len(self.draws) == 1 else {},
            "settings": settings.as_dict() | {"draws": len(self.draws)},
            folder.DATA: digests,
        }
        if len(self.draws) > 1:
            config["drawn_options"] = list(self.draws)
        return files.plain(config)

    def result(
        self, trained: Sequence[tuple[Trained, Mapping[str, Any]]], domains: Sequence[str]
    ) -> dict[str, Any]:
        """The result that every model selection chooses.

        Args:
          trained: all networks of the run, with what their files hold.
          domains: names of all domains.

        Raises:
          NonFiniteLossError: every draw diverged.
        """
        networks = [network for network, _ in trained]
        selected = selection.select(networks, self.test, domains)
        chosen = selected[selection.TRAINING_DOMAIN_VALIDATION]
        if chosen is None:
            first = next(found["diverged"] for _, found in trained if found["diverged"])
            every = f"{len(self.draws)} draws diverged, the first: " if self.draws[1:] else ""
            raise NonFiniteLossError(f"{every}{first}")
        testing = {network.draw: network for network in networks if network.held_out == {self.test}}

        def described(choice: Selected):
            return choice._asdict() | {"options": self.draws[choice.draw]}

        known = {name: choice for name, choice in selected.items() if choice is not None}
        result = {
            "complete": True,
            "method": self.method,
            "seed": self.seed,
            "test_domain": self.test,
            "options": self.draws[chosen.draw],
            "accuracy": chosen.accuracy,
            "selections": dict.fromkeys(selected)
            | {name: choice.accuracy for name, choice in known.items()},
            "selected": {name: described(choice) for name, choice in known.items()},
            "draws": len(self.draws),
            "diverged": sum(not network.records for network in testing.values()),
            "records": testing[chosen.draw].records,
            "seconds": sum(
                found["seconds"] for network, found in trained if len(network.held_out) == 1
            ),
        }
        return files.plain(result)


def train_all(
    runs: Sequence[Run],
    trainings: Trainings,
    workdir: pathlib.Path,
    interrupts: Interrupts,
    *,
    leave_two_out: bool,
    quiet: bool,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Trains what is missing and selects.

    A run whose every draw diverges is recorded as failed, and the others are trained.

    Args:
      runs: all runs.
      trainings: trains their networks.
      workdir: folder of everything that is written.
      interrupts: says whether to stop.
      leave_two_out: whether to train without each pair of domains, too.
      quiet: whether to print no progress.

    Returns:
      The results in the order of the runs, and a line for each run that failed.
    """
    settings, domains = trainings.settings, trainings.source.names
    pairs_of = domains if leave_two_out else ()
    configs = [
        folder.as_recorded(
            run.folder(workdir), run.configuration(settings, trainings.source.digests)
        )
        for run in runs
    ]
    results = [
        _earlier_result(run.folder(workdir), config, leave_two_out)
        for run, config in zip(runs, configs, strict=True)
    ]
    missing = [number for number, result in enumerate(results) if result is None]
    hosts.check(workdir, [configs[number] for number in missing], hosts.UNFINISHED)
    todo = _check_all(trainings, [runs[number] for number in missing], pairs_of)
    progress = RunProgress(todo, settings.intervals, quiet, unit="interval")
    failed: list[str] = []
    with folder.held(workdir), interrupts, progress:
        for place in (workdir / "trainings", *(runs[number].folder(workdir) for number in missing)):
            folder.check_inside(workdir, place)
        run_flags.apply_runtime_flags()
        files.write_json(workdir / "flags.json", run_flags.resolved())
        for group in _groups(runs, missing):
            for number in group:
                path = runs[number].folder(workdir) / folder.CONFIG
                files.write_json(path, configs[number])
            trained = _train([runs[number] for number in group], trainings, progress, pairs_of)
            for number, networks in zip(group, trained, strict=True):
                place = runs[number].folder(workdir)
                try:
                    results[number] = runs[number].result(networks, domains)
                except NonFiniteLossError as error:
                    failed.append(f"{runs[number]}: {error}")
                    folder.record_failure(place, str(error))
                else:
                    files.write_json(place / folder.RESULT, results[number])
    return [result for result in results if result is not None], failed


def _train(
    runs: Sequence[Run], trainings: Trainings, progress: RunProgress, pairs_of: Sequence[str]
) -> list[list[tuple[Trained, dict[str, Any]]]]:
    """All networks of every run with what their files hold; every draw trains for all runs."""
    trained: list[list[tuple[Trained, dict[str, Any]]]] = [[] for _ in runs]
    for draw in range(len(runs[0].draws)):
        for run, networks in zip(runs, trained, strict=True):
            for training in run.trainings(draw, pairs_of):
                found = trainings.run(training, progress)
                network = Trained(frozenset(training.held_out), draw, found["records"])
                networks.append((network, found))
    return trained


def _earlier_result(
    place: pathlib.Path, config: Mapping[str, Any], leave_two_out: bool
) -> dict[str, Any] | None:
    """A complete result, with the cross-validation if that is wanted.

    Raises:
      ValueError: the folder holds another run.
    """
    result = folder.finished_result(place, config, NAMES, run_flags.say)
    if result is not None and leave_two_out:
        has_pairs = result["selections"].get(selection.LEAVE_ONE_DOMAIN_OUT) is not None
        return result if has_pairs else None
    return result


def _check_all(trainings: Trainings, runs: Sequence[Run], pairs_of: Sequence[str]) -> int:
    """Number of networks to train.

    Raises:
      ValueError: a network cannot be trained as asked, or its folder holds another one.
    """
    places = set()
    for run in runs:
        for draw in range(len(run.draws)):
            for training in run.trainings(draw, pairs_of):
                if trainings.finished(training) is None:
                    places.add(trainings.place(training))
                trainings.program(training)
    return len(places)


def _groups(runs: Sequence[Run], missing: Sequence[int]) -> list[list[int]]:
    """Numbers of the runs of one method and seed: every draw trains for all test domains."""
    groups: dict[tuple[str, int], list[int]] = {}
    for number in missing:
        groups.setdefault((runs[number].method, runs[number].seed), []).append(number)
    return list(groups.values())
