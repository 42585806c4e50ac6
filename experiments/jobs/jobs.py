"""Jobs of a sweep: one run each, in a folder that says what it is, whether it is done, and its log.

A folder holds `job.json` (what to run), `lock` (held by the process that runs it), `log.txt`, `run`
(the experiment's own --workdir) and at last `outcome.json`. Anyone may run a job at any time, on
any machine that shares the folder: `experiments.jobs.run_job` takes the lock first, so that no job
is run twice at once, and the kernel drops the lock of a process that died.
"""

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.reporting import runs
from experiments.reporting.runs import OUTCOME
from experiments.runtime import files

JOB, LOG, RUN = "job.json", "log.txt", "run"
# Exit statuses of experiments.jobs.run_job, beside 0 and 1.
LOCKED, INTERRUPTED = 75, 130
# Enough to finish a step and save a checkpoint.
GRACE_SECONDS = 60.0

DONE, SKIPPED, FAILED, RUNNING, STOPPED = "done", "skipped", "failed", "running", "interrupted"
STATUSES = (DONE, SKIPPED, RUNNING, STOPPED, FAILED)


class Job(NamedTuple):
    """One run of an experiment module.

    Attributes:
      name: what sets it apart in its sweep.
      folder: where everything about it stands.
      experiment: module of that name in `experiments`.
      seed: its only seed.
      arguments: flags, without --seeds and --workdir.
    """

    name: str
    folder: str
    experiment: str
    seed: int
    arguments: tuple[str, ...]


class Outcome(NamedTuple):
    """How a job ended: its status, and the last line of its log where it failed."""

    job: Job
    status: str
    detail: str = ""


def plan(
    workdir: pathlib.Path,
    experiment: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, Sequence[str]],
    common: Sequence[str] = (),
) -> list[Job]:
    """Methods x seeds x settings, seeds outermost: what is interrupted leaves complete pairs.

    Args:
      workdir: folder of the sweep.
      experiment: a module.
      methods: names.
      seeds: numbers.
      settings: flag -> its values; all combinations are run.
      common: flags that every job gets.

    >>> jobs = plan(pathlib.Path("w"), "long_tail", ["erm"], [3], {"imbalance": ["10", "100"]})
    >>> [job.name for job in jobs]
    ['imbalance=10 erm seed 3', 'imbalance=100 erm seed 3']
    """
    combinations = [
        tuple(zip(settings, values, strict=True))
        for values in itertools.product(*settings.values())
    ]
    jobs = []
    for seed, chosen, method in itertools.product(seeds, combinations, methods):
        setting = ",".join(f"{name}={value}" for name, value in chosen)
        folder = workdir / "jobs" / (setting or experiment).replace("/", "_") / method / f"{seed}"
        flags = [f"--{name}={value}" for name, value in chosen]
        arguments = (f"--methods={method}", *common, *flags)
        name = f"{setting} {method} seed {seed}".strip()
        jobs.append(Job(name, str(folder), experiment, seed, arguments))
    return jobs


def prepare(jobs: Iterable[Job]) -> None:
    """Writes down what each job is, where that is not written yet.

    Raises:
      ValueError: a folder holds another job, or two jobs share one; then nothing is written.
    """
    jobs = list(jobs)
    if len({job.folder for job in jobs}) < len(jobs):
        raise ValueError("--set: two combinations of values would share a folder")
    missing = []
    for job in jobs:
        earlier = files.read_json(pathlib.Path(job.folder, JOB))
        if earlier is None:
            missing.append(job)
        elif earlier != _description(job):
            raise ValueError(
                f"--workdir: {job.folder} holds a job with other flags "
                f"({' '.join(earlier.get('arguments', ()))}); choose another --workdir"
            )
    for job in missing:
        files.write_json(pathlib.Path(job.folder, JOB), _description(job))


def read(folder: pathlib.Path) -> Job:
    """The job of a folder that `prepare` wrote."""
    return Job(folder=str(folder), **files.read_json(folder / JOB))


def _description(job: Job) -> dict[str, Any]:
    # Without the folder, which may be moved.
    return files.plain({key: value for key, value in job._asdict().items() if key != "folder"})


def is_done(folder: str | os.PathLike) -> bool:
    """Whether a job ended well and each of its results is still there, whole."""
    outcome = files.read_json(pathlib.Path(folder, OUTCOME))
    if not isinstance(outcome, dict) or outcome.get("exit_status") != 0:
        return False
    results = [pathlib.Path(folder, name) for name in outcome.get("results", ())]
    return bool(results) and all(isinstance(runs.read_run(result), runs.Run) for result in results)


def start(job: Job, environment: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Starts a job in a session of its own: a Ctrl-C at the terminal reaches the sweep alone."""
    return subprocess.Popen(  # noqa: S603 (our own module, no shell)
        [sys.executable, "-m", "experiments.jobs.run_job", job.folder],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def outcome_of(job: Job, exit_status: int) -> Outcome:
    """What the exit status of `experiments.jobs.run_job` means."""
    if exit_status == 0:
        return Outcome(job, DONE)
    if exit_status == LOCKED:
        return Outcome(job, RUNNING)
    if exit_status == INTERRUPTED:
        return Outcome(job, STOPPED)
    detail = last_line(pathlib.Path(job.folder, LOG))
    if exit_status < 0:
        detail = f"killed by {signal.Signals(-exit_status).name}; last line: {detail}"
    return Outcome(job, FAILED, detail)


def last_line(path: pathlib.Path) -> str:
    """The last line of a log that is not empty."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "no log"
    return next((line.strip() for line in reversed(lines) if line.strip()), "empty log")


def run_here(
    jobs: Sequence[Job],
    num_workers: int,
    gpus: Sequence[str] = (),
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Runs jobs in processes of this machine.

    A KeyboardInterrupt stops the running ones, waits for them, and is raised again.

    Args:
      jobs: in order.
      num_workers: how many run at once.
      gpus: worker i sees only device i modulo their number; empty leaves devices alone.
      report: called with each outcome as it comes.
    """
    waiting, outcomes = list(reversed(jobs)), []
    running: dict[int, tuple[Job, subprocess.Popen]] = {}
    try:
        while waiting or running:
            for worker in set(range(num_workers)) - set(running):
                if waiting:
                    job = waiting.pop()
                    running[worker] = job, start(job, _visible(gpus, worker))
            for worker, (job, process) in list(running.items()):
                if process.poll() is not None:
                    del running[worker]
                    outcomes.append(outcome_of(job, process.returncode))
                    report(outcomes[-1])
            time.sleep(0.05)
    finally:
        stop([process for _, process in running.values()])
    return outcomes


def _visible(gpus: Sequence[str], worker: int) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} if gpus else {}


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Asks processes to end, and ends those that do not within the grace."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
