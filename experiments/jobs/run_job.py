r"""Runs one job of a sweep, or checks the flags of jobs that are to come.

    python -m experiments.jobs.run_job runs/sweep/jobs/imbalance_10/lpa/3

runs what the folder's `job.json` says, unless another process runs it now (exit status 75) or it is
done. Everything that it prints goes to the folder's `log.txt`.
"""

import contextlib
import importlib
import json
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import ModuleType

from absl import flags

from experiments.jobs import jobs
from experiments.methods import names as methods
from experiments.reporting import runs
from experiments.runtime import files
from experiments.training import flags as run_flags
from lpa_jax.files import LockedError, hold

FLAGS = flags.FLAGS


@contextlib.contextmanager
def parsed(experiment: str, arguments: Sequence[str]) -> Iterator[ModuleType]:
    """The module of an experiment, its flags parsed within the block and forgotten after it.

    Raises:
      ValueError: there is no such experiment, flag, value or method.
    """
    try:
        module = importlib.import_module(f"experiments.{experiment}")
    except ImportError as error:
        raise ValueError(f"--experiment: no experiment {experiment!r} ({error})") from None
    if not hasattr(module, "define_flags"):
        raise ValueError(
            f"--experiment: experiments.{experiment} has no flags: it is no experiment"
        )
    before = set(FLAGS)
    try:
        module.define_flags()
        rest = FLAGS([experiment, *arguments])[1:]
        if rest:
            raise ValueError(f"{experiment}: unexpected argument {rest[0]!r}")
        for method in FLAGS.methods if "methods" in FLAGS else ():
            methods.parse(method)
        if "seeds" in FLAGS:
            run_flags.seeds(FLAGS.seeds)
        yield module
    except flags.Error as error:
        raise ValueError(f"{experiment}: {error}") from None
    finally:
        for name in set(FLAGS) - before:
            delattr(FLAGS, name)
        FLAGS.unparse_flags()


def run(folder: pathlib.Path) -> int:
    """Runs the job in the folder; the exit status."""
    try:
        with hold(folder, patience=0):
            if jobs.is_done(folder):
                return 0
            (folder / runs.OUTCOME).unlink(missing_ok=True)
            (folder / jobs.LOG).unlink(missing_ok=True)  # were it a link, it would be followed
            with (folder / jobs.LOG).open("w", encoding="utf-8") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            return _run_locked(folder)
    except LockedError:
        return jobs.LOCKED


def _run_locked(folder: pathlib.Path) -> int:
    job = jobs.read(folder)
    workdir = folder / jobs.RUN
    try:
        # --seeds=4 would mean the seeds 0 to 3; a job is one seed.
        own = (f"--seeds={job.seed}-{job.seed}", f"--workdir={workdir}")
        with parsed(job.experiment, [*job.arguments, *own]) as module:
            module.main([job.experiment])
        error = None
    except KeyboardInterrupt:
        return jobs.INTERRUPTED
    except SystemExit as end:
        # 128 + SIGINT or SIGTERM: how the experiments end when they were asked to stop.
        if end.code in (130, 143):
            return jobs.INTERRUPTED
        error = str(end.code) if end.code else None
    except Exception as failure:
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}"
    results, problems = runs.collect([workdir]) if workdir.is_dir() else ([], [])
    if error is None and (problems or not results):
        error = problems[0].reason if problems else "ended without a result"
    if error is not None:
        print(error, file=sys.stderr, flush=True)
    outcome = {
        "exit_status": 0 if error is None else 1,
        "results": [str(result.folder.relative_to(folder)) for result in results],
        "last_line": error,
    }
    files.write_json(folder / runs.OUTCOME, outcome)
    return outcome["exit_status"]


def _leave(number, frame) -> None:
    """Ends the process: outside a training, which handles SIGTERM itself, there is nothing to save.

    At once, since an exception would be swallowed where the signal comes within a callback of the
    garbage collector (JAX has one), and the job would go on until it is killed.
    """
    os.write(2, b"SIGTERM: stopped outside the training\n")
    os._exit(jobs.INTERRUPTED)


def check(experiment: str, argument_lists: Sequence[Sequence[str]]) -> None:
    """Parses flags as the jobs will.

    Raises:
      ValueError: naming the first that would be refused.
    """
    for arguments in argument_lists:
        with parsed(experiment, [*arguments, "--seeds=1", "--workdir=unused"]):
            pass


def main(argv: Sequence[str]) -> int:
    """Entry point: a job's folder, or `--check` with the jobs to check on standard input."""
    if argv[1:] == ["--check"]:
        asked = json.load(sys.stdin)
        try:
            check(asked["experiment"], asked["arguments"])
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    if len(argv) != 2 or not pathlib.Path(argv[1], jobs.JOB).is_file():
        print(f"error: name one folder with a {jobs.JOB}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _leave)
    return run(pathlib.Path(argv[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
