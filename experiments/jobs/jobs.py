"""Jobs of a sweep. A job is one run of an experiment, with a folder of its own.

The folder holds `job.json` (what to run), `lock` (held by the process that runs it), `log.txt`,
`run` (the --workdir of the experiment) and finally `outcome.json`. Several sweeps and machines may
share folders: `experiments.jobs.run_job` takes the lock first, so that no job runs twice at once.
The kernel releases the lock of a process that died.
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

from experiments.reporting.runs import OUTCOME, OUTCOME_SCHEMA, Run, read_run
from experiments.runtime import files, schema
from experiments.runtime.schema import TEXT, WHOLE

JOB, LOG, RUN = "job.json", "log.txt", "run"
JOB_SCHEMA = {"name": TEXT, "experiment": TEXT, "seed": WHOLE, "arguments": [TEXT]}
# Exit statuses of `experiments.jobs.run_job` besides 0 and 1.
LOCKED, INTERRUPTED = 75, 130
# Time to finish a step and save a checkpoint.
GRACE_SECONDS = 60.0

DONE, SKIPPED, FAILED, RUNNING, STOPPED = "done", "skipped", "failed", "running", "interrupted"
STATUSES = (DONE, SKIPPED, RUNNING, STOPPED, FAILED)


class Job(NamedTuple):
    """One run of an experiment.

    Attributes:
      name: unique within the sweep, for people.
      folder: of everything about the job.
      experiment: name of a module in `experiments`.
      seed: of the run.
      arguments: flags besides --seeds and --workdir.
    """

    name: str
    folder: str
    experiment: str
    seed: int
    arguments: tuple[str, ...]


class Outcome(NamedTuple):
    """The status of a job that ended; `detail` is the last line of its log if it failed."""

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
    """Methods x seeds x settings. Seeds vary slowest: an interrupted sweep has complete pairs.

    Args:
      workdir: folder of the sweep.
      experiment: name of a module in `experiments`.
      methods: one job runs one method.
      seeds: one job runs one seed.
      settings: flag -> its values; the sweep has all combinations.
      common: flags of every job.

    Example:
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


def prepare(jobs: Iterable[Job], say: Callable[[str], None] = lambda line: None) -> None:
    """Writes `job.json` into the folders that have none.

    Args:
      jobs: of a sweep.
      say: called with a line for a damaged file, which is written again.

    Raises:
      ValueError: a folder holds another job, or two jobs share a folder. Nothing is written then.
    """
    jobs = list(jobs)
    if len({job.folder for job in jobs}) < len(jobs):
        raise ValueError("--set must not have two combinations that share a folder")
    missing = []
    for job in jobs:
        earlier = schema.read_or_say(pathlib.Path(job.folder, JOB), JOB_SCHEMA, say)
        if earlier is None:
            missing.append(job)
        elif earlier != _description(job):
            raise ValueError(
                f"--workdir: {job.folder} holds a job with other flags "
                f"({' '.join(earlier['arguments'])}); choose another --workdir"
            )
    for job in missing:
        files.write_json(pathlib.Path(job.folder, JOB), _description(job))


def read(folder: pathlib.Path) -> Job:
    """The job in a folder.

    Raises:
      ValueError: `job.json` does not describe a job.
    """
    description = schema.read(folder / JOB, JOB_SCHEMA)
    if description is None:
        raise ValueError(f"{folder / JOB} is missing")
    return Job(folder=str(folder), **description)


def _description(job: Job) -> dict[str, Any]:
    # Without the folder: a sweep may be moved.
    return files.plain({key: value for key, value in job._asdict().items() if key != "folder"})


def is_done(folder: str | os.PathLike) -> bool:
    """Whether a job ended with status 0 and all of its results are still there and whole."""
    try:
        outcome = schema.read(pathlib.Path(folder, OUTCOME), OUTCOME_SCHEMA)
    except ValueError:
        return False
    if outcome is None or outcome["exit_status"] != 0:
        return False
    results = [pathlib.Path(folder, name) for name in outcome.get("results", ())]
    return bool(results) and all(isinstance(read_run(result), Run) for result in results)


def start(job: Job, environment: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Starts a job in a new session, so that Ctrl-C in the terminal reaches the sweep alone."""
    return subprocess.Popen(  # noqa: S603 (this package, no shell)
        [sys.executable, "-m", "experiments.jobs.run_job", job.folder],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def outcome_of(job: Job, exit_status: int) -> Outcome:
    """The outcome of a job by the exit status of `experiments.jobs.run_job`."""
    statuses = {0: DONE, LOCKED: RUNNING, INTERRUPTED: STOPPED}
    if exit_status in statuses:
        return Outcome(job, statuses[exit_status])
    detail = last_line(pathlib.Path(job.folder, LOG))
    if exit_status < 0:
        detail = f"killed by {signal.Signals(-exit_status).name}; last line: {detail}"
    return Outcome(job, FAILED, detail)


def last_line(path: pathlib.Path) -> str:
    """The last line of a log that holds text."""
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
    """Runs jobs in processes on this machine.

    A KeyboardInterrupt stops the running jobs, waits for them, and is raised again.

    Args:
      jobs: in the order to start them.
      num_workers: most processes at once.
      gpus: worker i sees the device gpus[i % len(gpus)] alone; empty: all devices.
      report: called with each outcome when its job ends.
    """
    # One thread that polls: an interrupt finds every started process in `running`.
    waiting, outcomes = list(reversed(jobs)), []
    running: dict[int, tuple[Job, subprocess.Popen]] = {}
    try:
        while waiting or running:
            for worker in set(range(num_workers)) - set(running):
                if waiting:
                    job = waiting.pop()
                    visible = {"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} if gpus else {}
                    running[worker] = job, start(job, visible)
            for worker, (job, process) in list(running.items()):
                if process.poll() is not None:
                    del running[worker]
                    outcomes.append(outcome_of(job, process.returncode))
                    report(outcomes[-1])
            time.sleep(0.05)
    finally:
        stop([process for _, process in running.values()])
    return outcomes


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Sends SIGTERM to processes, and SIGKILL to those that run on for `GRACE_SECONDS`."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
