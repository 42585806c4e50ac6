"""Runs one job of a sweep, or checks the flags of jobs before any runs.

    python -m experiments.jobs.run_job runs/sweep/jobs/imbalance=10/lpa/3

runs the job in a folder, unless it is done or another process runs it (exit status 75). Everything
it prints goes to the `log.txt` of the folder.
"""

import contextlib
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import ModuleType

from absl import flags

from experiments.jobs import jobs
from experiments.methods import flags as method_flags
from experiments.methods import names
from experiments.reporting.runs import OUTCOME, collect
from experiments.runtime import console, files
from experiments.runtime import main as entry_point
from experiments.training import flags as run_flags
from lpa_jax import checks
from lpa_jax.files import LockedError, hold
from lpa_jax.training.interrupts import SIGNALS

FLAGS = flags.FLAGS


@contextlib.contextmanager
def parsed(experiment: str, arguments: Sequence[str]) -> Iterator[ModuleType]:
    """Imports an experiment; its flags are parsed within the block and removed after it.

    Raises:
      ValueError: no such experiment, flag, value or method.
    """
    found = pathlib.Path(__file__).parents[1].glob("[!_]*.py")
    checks.choice("--experiment", experiment, sorted(path.stem for path in found))
    module = importlib.import_module(f"experiments.{experiment}")
    before = set(FLAGS)
    try:
        module.define_flags()
        rest = FLAGS(entry_point.with_flagfiles([experiment, *arguments]))[1:]
        if rest:
            raise ValueError(f"{experiment}: unexpected argument {rest[0]!r}")
        for method in FLAGS.methods if "methods" in FLAGS else ():
            names.parse(method)
        if "seeds" in FLAGS:
            run_flags.seeds()
        yield module
    except flags.Error as error:
        raise ValueError(f"{experiment}: {error}") from None
    finally:
        for flag in set(FLAGS) - before:
            delattr(FLAGS, flag)
        FLAGS.unparse_flags()


def run(folder: pathlib.Path) -> int:
    """Runs the job in a folder and returns the exit status."""
    try:
        with hold(folder, patience=0):
            if jobs.is_done(folder):
                return 0
            for name in (OUTCOME, jobs.LOG):  # unlinked: `open` would follow a link
                (folder / name).unlink(missing_ok=True)
            with (folder / jobs.LOG).open("w", encoding="utf-8") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            return _run_locked(folder)
    except LockedError:
        return jobs.LOCKED


def _run_locked(folder: pathlib.Path) -> int:
    workdir = folder / jobs.RUN
    try:
        job = jobs.read(folder)
        # --num_seeds=4 would mean four seeds.
        own = (f"--seeds={job.seed}-{job.seed}", f"--workdir={workdir}")
        with parsed(job.experiment, [*job.arguments, *own]) as module:
            if "option" in FLAGS:
                method_flags.forget_unreached(FLAGS.methods)
            module.main([job.experiment])
        error = None
    except KeyboardInterrupt:
        return jobs.INTERRUPTED
    except SystemExit as end:
        # An experiment that was asked to stop.
        if end.code in {128 + number for number in SIGNALS}:
            return jobs.INTERRUPTED
        error = str(end.code) if end.code else None
    except ValueError as refused:
        error = f"error: {refused}"
    except Exception as failure:
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}"
    results, problems = collect([workdir]) if workdir.is_dir() else ([], [])
    if error is None and (problems or not results):
        error = problems[0].reason if problems else "ended without a result"
    if error is not None:
        print(error, file=sys.stderr, flush=True)
    outcome = {
        "exit_status": 0 if error is None else 1,
        "results": [str(result.folder.relative_to(folder)) for result in results],
        "last_line": error,
    }
    files.write_json(folder / OUTCOME, outcome)
    return outcome["exit_status"]


def _leave(number, frame) -> None:
    """Ends the process at once: training handles signals itself, elsewhere nothing is to be saved.

    An exception would be lost if the signal came within a callback of the garbage collector (JAX
    has one), and the job would run until it is killed.
    """
    console.announce(f"{signal.Signals(number).name}: stopped outside the training")
    os._exit(jobs.INTERRUPTED)


def check(experiment: str, argument_lists: Sequence[Sequence[str]]) -> None:
    """Parses the flags of jobs as the jobs will.

    Raises:
      ValueError: naming the first flag that a job would refuse, or that reaches no job's method.
    """
    missed: dict[str, list[bool]] = {}
    for arguments in argument_lists:
        with parsed(experiment, [*arguments, "--seeds=1-1", "--workdir=unused"]):
            for flag, is_missed in method_flags.reach(FLAGS.methods) if "option" in FLAGS else ():
                missed.setdefault(flag, []).append(is_missed)
    for flag, of_jobs in missed.items():
        if all(of_jobs):
            raise ValueError(f"{experiment}: {flag} reaches no method of the sweep")


def check_in_new_process(experiment: str, argument_lists: Sequence[Sequence[str]]) -> None:
    """Calls `check` in a process that has no flags yet.

    Raises:
      ValueError: as `check`.
    """
    checked = subprocess.run(
        [sys.executable, "-m", "experiments.jobs.run_job", "--check"],
        input=json.dumps({"experiment": experiment, "arguments": argument_lists}),
        capture_output=True,
        text=True,
        check=False,
    )
    if checked.returncode != 0:
        raise ValueError((checked.stderr.strip() or "no answer").splitlines()[-1])


def main(argv: Sequence[str]) -> int:
    """Entry point: the folder of a job, or `--check` with jobs to check on standard input."""
    if argv[1:] == ["--check"]:
        asked = json.load(sys.stdin)
        try:
            check(asked["experiment"], asked["arguments"])
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    if len(argv) != 2 or not pathlib.Path(argv[1], jobs.JOB).is_file():
        print(f"error: the argument must be one folder with a {jobs.JOB}", file=sys.stderr)
        return 1
    console.install()
    entry_point.heed_ctrl_c()
    for number in {*SIGNALS} - {signal.SIGINT}:
        signal.signal(number, _leave)
    return run(pathlib.Path(argv[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
