"""The random search of both protocols: flags, workers that share the trials, and the choice."""

import contextlib
import csv
import dataclasses
import io
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from absl import flags

from experiments.runtime import fields, files, schema
from experiments.runtime.progress import RunProgress
from experiments.training import flags as run_flags
from experiments.training import folder as run_folder
from lpa_jax.training.interrupts import Interrupts

FLAGS = flags.FLAGS
SETTING = "setting.json"
TABLE = "trials.csv"


class Trial(NamedTuple):
    """A part of a search that one process trains as a whole.

    Attributes:
      method: its name.
      number: of the draw of options; a worker has all parts of a draw.
      test: the domain that the score is without; None if the data have no domains.
      lock: folder that a process holds while it trains.
      find: () -> {"options": ..., "score": validation accuracy or None if it diverged}, or None if
        the trial is missing.
      train: (progress) -> None: trains, and keeps what `find` reads.
    """

    method: str
    number: int
    test: str | None
    lock: pathlib.Path
    find: Callable[[], Mapping[str, Any] | None]
    train: Callable[[RunProgress], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Settings of a search, and the share of it that this process runs."""

    GROUP: ClassVar[str] = "search"

    trials: int = fields.setting(40, "Trials of every method.", low=1, high=10**5)
    search_seed: int = fields.setting(0, "Seed of the random search.", low=0)
    output: str = fields.setting(
        "", "File for the chosen hyperparameters; empty writes none.", path=True
    )
    worker: int = fields.setting(
        0, "Number of the share of the trials that this process runs.", low=0
    )
    num_workers: int = fields.setting(
        1, "Number of processes that share the trials.", low=1, high=10**5
    )


def define_flags(trials: int, seeds: str) -> None:
    """Defines the flags of a search, with its default number of trials and its default seeds."""
    fields.define(Search, trials=trials)
    about = "; every trial is averaged over them. Do not use test seeds"
    run_flags.define_seeds(None, [seeds], about)


def check_flags() -> None:
    """Refuses flags that are out of bounds.

    Raises:
      ValueError: naming the flag.
    """
    fields.check(fields.read(Search))
    if FLAGS.worker >= FLAGS.num_workers:
        raise ValueError(
            f"--worker must be in 0..{FLAGS.num_workers - 1} (--num_workers - 1), "
            f"got {FLAGS.worker}"
        )
    if FLAGS.output:  # it is written when the search is over
        files.check_writable("output", FLAGS.output)


def check_setting(workdir: pathlib.Path, setting: Mapping[str, Any]) -> dict[str, Any]:
    """The setting as the workdir holds it, see `folder.as_recorded`.

    Raises:
      ValueError: the trials of the workdir were made with other settings, or on other data.
    """
    setting = run_folder.as_recorded(workdir, setting, run_folder.Names(config=SETTING))
    earlier = schema.read_or_say(workdir / SETTING, schema.ANY, run_flags.say)
    if earlier is not None:
        run_folder.check_same_run(workdir, earlier, setting, "trials")
    return setting


def missing(trials: Sequence[Trial]) -> list[Trial]:
    """The trials of this worker's share that are not finished."""
    return [
        trial
        for trial in trials
        if trial.number % FLAGS.num_workers == FLAGS.worker and trial.find() is None
    ]


def run(
    workdir: pathlib.Path,
    trials: Sequence[Trial],
    progress: RunProgress,
    interrupts: Interrupts,
    setting: Mapping[str, Any] | None = None,
) -> None:
    """Trains trials, each by one process at a time.

    Workers share a workdir, so that none may lock it as a whole. A worker locks its share, and each
    trial while it trains: workers with different --num_workers have trials in common.

    Args:
      workdir: folder of everything that is written.
      trials: see `missing`.
      progress: shows how far they are.
      interrupts: says whether to stop.
      setting: what all trials have in common, for `check_setting`.

    Raises:
      InterruptedRunError: a signal came.
      lpa_jax.files.LockedError: another process runs this share, or one of the trials.
    """
    share = workdir / "locks" / f"worker_{FLAGS.worker}"
    with _held(workdir, share), interrupts, progress:
        run_flags.apply_runtime_flags()
        if setting is not None:
            files.write_json(workdir / SETTING, setting)
        for trial in trials:
            with _held(workdir, trial.lock):
                trial.train(progress)


def _held(workdir: pathlib.Path, folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    run_folder.check_inside(workdir, folder)
    return run_folder.held(folder)


def _outcomes(trials: Sequence[Trial]) -> list[Mapping[str, Any]] | None:
    """What every trial found; None, and a line, if one is missing."""
    outcomes = [trial.find() for trial in trials]
    if None not in outcomes:
        return outcomes
    print("Trials of other workers are missing; run those workers, then any of them again.")
    return None


def finalists(trials: Sequence[Trial], count: int) -> list[Trial] | None:
    """The trials of every method with the highest scores; None, and a line, if one is missing.

    Args:
      trials: all trials, of all workers.
      count: how many of each method; those that diverged are left out.
    """
    outcomes = _outcomes(trials)
    if outcomes is None:
        return None
    scored: dict[str, list[tuple[float, Trial]]] = {}
    for trial, found in zip(trials, outcomes, strict=True):
        if found["score"] is not None:
            scored.setdefault(trial.method, []).append((found["score"], trial))
    # Sorting is stable: of equal scores the first trial counts.
    ranked = (sorted(own, key=lambda pair: -pair[0])[:count] for own in scored.values())
    return [trial for own in ranked for _, trial in own]


def finish(
    trials: Sequence[Trial], setting: Mapping[str, Any], finals: Sequence[Trial] = ()
) -> None:
    """Prints the choice of every method and writes it to --output, if no trial is missing.

    Writes the options and the score of every trial to `trials.csv` in --workdir.

    Args:
      trials: all trials, of all workers.
      setting: how was searched, for the record.
      finals: if any, the trials to choose from, as they are after further training.

    Raises:
      ValueError: every trial of a method diverged.
    """
    last = {(trial.method, trial.number): trial for trial in finals}
    trials = [last.get((trial.method, trial.number), trial) for trial in trials]
    outcomes = _outcomes(trials)
    if outcomes is None:
        return
    files.write_text(pathlib.Path(FLAGS.workdir) / TABLE, table(trials, outcomes, bool(last)))
    chosen = {}
    for method in dict.fromkeys(trial.method for trial in trials):
        of_method = [
            place
            for place, trial in enumerate(trials)
            if trial.method == method and (not last or (method, trial.number) in last)
        ]
        entry = choose([(trials[i].number, trials[i].test, outcomes[i]) for i in of_method])
        if entry is None:
            where = "" if trials[0].test is None else " for some test domain"
            raise ValueError(f"--methods: every trial of {method} diverged{where}")
        chosen[method] = entry
        print(f"{method}: {100 * entry['validation_accuracy']:.2f} %  {entry['chosen']}")
        for test, found in entry.get("by_test_domain", {}).items():
            accuracy = 100 * found["validation_accuracy"]
            print(f"  without {test}: {accuracy:.2f} %  trial {found['trial']}")
    if FLAGS.output:
        search = {**setting, "trials": FLAGS.trials}
        files.write_json(FLAGS.output, {"search": search, "methods": chosen})
        print(f"Written to {FLAGS.output}")


def table(
    trials: Sequence[Trial], outcomes: Sequence[Mapping[str, Any]], seeds: bool = False
) -> str:
    """CSV text with a line for each trial; options that a method does not have are empty.

    Args:
      trials: all trials.
      outcomes: of each, what its `find` returns.
      seeds: whether to say with how many seeds each was trained.
    """
    rows = [
        {"method": trial.method, "trial": trial.number}
        | ({} if trial.test is None else {"test_domain": trial.test})
        | ({"seeds": len(found["accuracies"])} if seeds else {})
        | {"validation_accuracy": found["score"]}
        | dict(found["options"])
        for trial, found in zip(trials, outcomes, strict=True)
    ]
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def choose(
    outcomes: Sequence[tuple[int, str | None, Mapping[str, Any]]],
) -> dict[str, Any] | None:
    """A method's best trial: on average, and for each test domain if there are any.

    Args:
      outcomes: (number of the trial, test domain or None, what its `find` returns); of equal trials
        and domains the score is the mean.

    Returns:
      The method's entry in the file of choices; None if all trials diverged, for a test domain or
      on average.

    >>> outcomes = [(0, None, {"options": {}, "score": 0.5}),
    ...             (1, None, {"options": {"lpa.steps": 2}, "score": 0.7})]
    >>> choose(outcomes)["chosen"]
    {'lpa.steps': 2}
    """
    options = {number: found["options"] for number, _, found in outcomes}
    by_test: dict[str | None, dict[int, list[float | None]]] = {}
    for number, test, found in outcomes:
        by_test.setdefault(test, {}).setdefault(number, []).append(found["score"])
    means = {
        test: {number: _mean(scores) for number, scores in of_test.items()}
        for test, of_test in by_test.items()
    }
    best_by_test = {test: best(scores) for test, scores in means.items()}
    average = {number: _mean([scores[number] for scores in means.values()]) for number in options}
    chosen = best(average)
    if chosen is None or None in best_by_test.values():
        return None
    entry = {
        "chosen": options[chosen],
        "trial": chosen,
        "validation_accuracy": average[chosen],
        "all_scores": sorted((s for s in average.values() if s is not None), reverse=True),
        "diverged": sum(score is None for score in average.values()),
    }
    if None in means:
        return entry
    return entry | {
        "by_test_domain": {
            test: {
                "options": options[number],
                "trial": number,
                "validation_accuracy": means[test][number],
            }
            for test, number in best_by_test.items()
        }
    }


def best(scores: Mapping[int, float | None]) -> int | None:
    """The first of the trials with the highest score; None if all diverged.

    >>> best({0: None, 1: 0.5, 2: 0.7, 3: 0.7})
    2
    """
    scored = {trial: score for trial, score in scores.items() if score is not None}
    return max(scored, key=scored.__getitem__, default=None)


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)
