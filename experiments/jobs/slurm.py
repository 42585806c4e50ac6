"""Jobs of a sweep on a cluster: submitit runs them, Slurm's queue says how they ended."""

import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.jobs import jobs
from experiments.jobs.jobs import FAILED, STOPPED, Job, Outcome

# States of Slurm jobs that may still run.
ALIVE = frozenset(
    (
        *("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"),
        *("STAGE_OUT", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"),
        *("RESV_DEL_HOLD", "SPECIAL_EXIT"),
    )
)
# States of jobs that ended without an error of their own.
ASKED_TO_STOP = frozenset(("CANCELLED", "PREEMPTED", "TIMEOUT", "DEADLINE"))
QUEUE_INTERVAL_SECONDS = 10.0
# Time that a result may take to get through a shared file system.
PATIENCE_SECONDS = 60.0


def parameters(texts: Sequence[str], num_workers: int) -> dict[str, Any]:
    """Parameters of submitit's executor.

    Raises:
      ValueError: a text that is not NAME=VALUE.

    Example:
      >>> parameters(["timeout_min=60", "slurm_partition=gpu"], 4)
      {'timeout_min': 60, 'slurm_partition': 'gpu', 'slurm_array_parallelism': 4}
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--slurm must be NAME=VALUE, got {text!r}")
        found[name] = int(value) if value.isdecimal() and len(value) < 20 else value
    return found | {"slurm_array_parallelism": num_workers}


def executor(folder: pathlib.Path, cluster: str, **chosen: Any):
    """Submitit's executor for a kind of cluster.

    Raises:
      ValueError: submitit is not installed, finds no such cluster or refuses a parameter.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError("--cluster needs submitit: pip install -e '.[slurm]'") from None
    try:
        made = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except RuntimeError as error:
        raise ValueError(f"--cluster={cluster}: {error}") from None
    try:
        made.update_parameters(**chosen)
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(f"--slurm: {str(error).splitlines()[0]}") from None
    return made


class Attempt:
    """Runs a job on a node until it ends or Slurm stops it.

    SIGTERM (`scancel`, preemption) is passed on: some process trackers send it to this process
    alone, and the job, which has a session of its own, would be killed unsaved. Before the time
    limit submitit calls `checkpoint` and has Slurm queue the job again.
    """

    def __init__(self):
        self._pid: int | None = None

    def __call__(self, job: Job) -> Outcome:
        """Runs the job and returns its outcome."""
        process = jobs.start(job)
        self._pid = process.pid
        earlier = signal.getsignal(signal.SIGTERM)

        def pass_on(number, frame):
            self._terminate()
            if callable(earlier):
                earlier(number, frame)

        signal.signal(signal.SIGTERM, pass_on)
        try:
            while not _ended(process.pid):
                time.sleep(0.1)
        finally:
            self._stop()
            status = process.wait()
            signal.signal(signal.SIGTERM, earlier)
        return jobs.outcome_of(job, status)

    def checkpoint(self, job: Job) -> Any:
        """Stops the job, which saves, and returns what submitit queues again."""
        from submitit.helpers import DelayedSubmission

        self._stop()
        return DelayedSubmission(Attempt(), job)

    # Both are called within signal handlers, when the lock of a Popen may be held.

    def _terminate(self) -> None:
        if self._pid is not None and not _ended(self._pid):
            os.kill(self._pid, signal.SIGTERM)

    def _stop(self) -> None:
        self._terminate()
        deadline = time.monotonic() + jobs.GRACE_SECONDS
        while self._pid is not None and not _ended(self._pid):
            if time.monotonic() > deadline:
                os.kill(self._pid, signal.SIGKILL)
            time.sleep(0.05)


def _ended(pid: int) -> bool:
    """Whether a child has ended; its exit status can still be waited for."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def run(
    planned: Sequence[Job],
    executor,
    ended: Callable[[Job, Any], Outcome | None],
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Runs jobs through a submitit executor; a KeyboardInterrupt cancels those that run.

    Args:
      planned: in order.
      executor: a `submitit.AutoExecutor`, or anything with its `batch` and `submit`.
      ended: returns the outcome of a submitted job, None while there is none.
      report: called with each outcome when its job ends.
    """
    with executor.batch():
        submitted = {i: executor.submit(Attempt(), job) for i, job in enumerate(planned)}
    outcomes = []
    try:
        while submitted:
            for i, remote in list(submitted.items()):
                outcome = ended(planned[i], remote)
                if outcome is not None:
                    del submitted[i]
                    outcomes.append(outcome)
                    report(outcome)
            time.sleep(0.2)
    finally:
        for remote in submitted.values():
            remote.cancel()
    return outcomes


def by_submitit(job: Job, remote) -> Outcome | None:
    """The outcome of a job by submitit, None while it has not ended."""
    return _outcome(job, remote) if remote.done() else None


def _outcome(job: Job, remote) -> Outcome:
    error = remote.exception()
    if error is None:
        return Outcome(job, *remote.result()[1:])
    # The node was lost or the time ran out: the job itself has left no outcome.
    return Outcome(job, FAILED, str(error).strip().splitlines()[-1])


class SlurmQueue:
    """The outcome of a job by `squeue`, None while Slurm has it queued or running.

    Submitit asks `sacct`: without Slurm's accounting it would wait for ever for a job that was
    cancelled or killed, and with it up to ten minutes. A job that was preempted and queued again
    has left the outcome "interrupted" of its first attempt, which counts only if Slurm does not run
    the job again.
    """

    def __init__(self):
        self._asked = float("-inf")
        self._states: Mapping[str, str] | None = None
        self._silent_since: dict[str, float] = {}

    def __call__(self, job: Job, remote) -> Outcome | None:
        """The outcome of a job, which submitit knows as `remote`, or None."""
        states = self._current()
        state = None if states is None else states.get(remote.job_id, "unknown")
        alive = state is None or state in ALIVE
        if remote.paths.result_pickle.exists():
            outcome = _outcome(job, remote)
            return None if alive and outcome.status == STOPPED else outcome
        if alive:
            self._silent_since.pop(remote.job_id, None)
            return None
        since = self._silent_since.setdefault(remote.job_id, time.monotonic())
        if time.monotonic() - since < PATIENCE_SECONDS:
            return None
        status = STOPPED if state in ASKED_TO_STOP else FAILED
        return Outcome(job, status, f"Slurm job {remote.job_id} ended without a result: {state}")

    def _current(self) -> Mapping[str, str] | None:
        """Slurm's state of every job of this user, None if Slurm does not answer."""
        if time.monotonic() - self._asked >= QUEUE_INTERVAL_SECONDS:
            self._states, self._asked = queue_states(), time.monotonic()
        return self._states


def queue_states() -> dict[str, str] | None:
    """State by job id of this user's jobs, also of recently ended ones; None if Slurm fails."""
    command = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i %T"]
    try:
        answer = subprocess.run(  # noqa: S603 (no shell, no argument from outside)
            command, capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(line.split() for line in answer.stdout.splitlines())
