"""What the random searches share: flags, shares of workers, the best trial, the file of choices."""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments.runtime import files
from experiments.training import flags as run_flags
from experiments.training import folder as run_folder

FLAGS = flags.FLAGS


def define_flags(trials: int, seeds: str) -> None:
    """Flags of a search, with its default number of trials and its default seeds."""
    flags.DEFINE_integer("trials", trials, "Trials of every method.")
    flags.DEFINE_list(
        "seeds",
        [seeds],
        f"{run_flags.SEEDS}; every trial is averaged over them, keep test seeds out.",
    )
    flags.DEFINE_integer("search_seed", 0, "Seed of the random search.")
    flags.DEFINE_string("output", "", "File for the chosen hyperparameters; not written if empty.")
    flags.DEFINE_integer("worker", 0, "Which share of the trials this process runs.")
    flags.DEFINE_integer("num_workers", 1, "Processes that share the trials.")


def check_flags() -> None:
    """Refuses what no search can do.

    Raises:
      ValueError: naming the flag.
    """
    if FLAGS.trials < 1:
        raise ValueError(f"--trials must be >= 1, got {FLAGS.trials}")
    if not 0 <= FLAGS.worker < FLAGS.num_workers:
        raise ValueError(
            f"--worker must lie in 0..{FLAGS.num_workers - 1} (--num_workers - 1), "
            f"got {FLAGS.worker}"
        )
    if FLAGS.output:  # it is written when the search is over
        files.check_writable("output", FLAGS.output)


def is_mine(trial: int) -> bool:
    """Whether a trial is in this worker's share."""
    return trial % FLAGS.num_workers == FLAGS.worker


def held(workdir: pathlib.Path, folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other processes out of a folder of the workdir.

    Workers share a workdir, so it is not locked itself: a worker holds its `share`, and each trial
    while it trains, since workers that were told different --num_workers have trials in common.

    Raises:
      ValueError: a symbolic link leads out of the workdir.
      lpa_jax.files.LockedError: another process holds the folder.
    """
    run_folder.check_inside(workdir, folder)
    return run_folder.held(folder)


def share(workdir: pathlib.Path) -> pathlib.Path:
    """What stands for this worker's share: a folder that holds nothing but its lock."""
    return workdir / "locks" / f"worker_{FLAGS.worker}"


def best(scores: Mapping[int, float | None]) -> int | None:
    """The first of the trials with the highest score; None if all diverged.

    >>> best({0: None, 1: 0.5, 2: 0.7, 3: 0.7})
    2
    """
    scored = {trial: score for trial, score in scores.items() if score is not None}
    return max(scored, key=scored.__getitem__, default=None)


def choice(
    scores: Mapping[int, float | None], options: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """What a method's entry in the file of choices says; None if all trials diverged.

    Args:
      scores: validation accuracy by trial; None if the trial diverged.
      options: by trial.
    """
    chosen = best(scores)
    if chosen is None:
        return None
    return {
        "chosen": options[chosen],
        "trial": chosen,
        "validation_accuracy": scores[chosen],
        "all_scores": sorted((s for s in scores.values() if s is not None), reverse=True),
        "diverged": sum(score is None for score in scores.values()),
    }


def say_incomplete() -> None:
    """Says that this worker is through and others are not."""
    print("Trials of other workers are missing; run any worker again when they are done.")


def say_choice(method: str, entry: Mapping[str, Any]) -> None:
    """A line with what was chosen for a method."""
    print(f"{method}: {100 * entry['validation_accuracy']:.2f} %  {entry['chosen']}")


def write(search: Mapping[str, Any], chosen: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the file that the experiments take as --hparams, if --output names one.

    Args:
      search: how was searched, for the record.
      chosen: entries by method.
    """
    if not FLAGS.output:
        return
    content = {"search": {**search, "trials": FLAGS.trials}, "methods": chosen}
    files.write_json(FLAGS.output, content)
    print(f"Written to {FLAGS.output}")
