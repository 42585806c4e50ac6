"""Jobs of a sweep on a cluster, through submitit; how they end is asked of Slurm's own queue."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.jobs import jobs
from experiments.jobs.jobs import FAILED, STOPPED, Job, Outcome

# Job states of Slurm after which something may still come.
ALIVE = frozenset(
    (
        *("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"),
        *("STAGE_OUT", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"),
        *("RESV_DEL_HOLD", "SPECIAL_EXIT"),
    )
)
# How a job ends that did nothing wrong.
ASKED_TO_STOP = frozenset(("CANCELLED", "PREEMPTED", "TIMEOUT", "DEADLINE"))
QUEUE_INTERVAL_SECONDS = 10.0
# A result may take that long to come through a shared file system.
PATIENCE_SECONDS = 60.0


class Attempt:
    """Runs a job on a node to its end, or to where Slurm stops it.

    SIGTERM (`scancel`, preemption) is passed on: some process trackers tell only this process, and
    the job, in a session of its own, would be killed unsaved. Before the time limit submitit calls
    `checkpoint` and has Slurm queue the job again.
    """

    def __init__(self):
        """Nothing runs yet."""
        self._pid: int | None = None

    def __call__(self, job: Job) -> Outcome:
        """Runs the job; how it ended."""
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
        """Stops the job, which saves; what submitit shall queue again."""
        from submitit.helpers import DelayedSubmission

        self._stop()
        return DelayedSubmission(Attempt(), job)

    # Both are called within signal handlers, where the locks of a Popen may be held.

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
    """Whether a child has ended, without taking its exit status away."""
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
    """Runs jobs through a submitit executor; a KeyboardInterrupt cancels those not ended.

    Args:
      planned: in order.
      executor: `submitit.AutoExecutor`, or anything with its `batch` and `submit`.
      ended: the outcome of a job that was submitted, None while there is none.
      report: called with each outcome as it comes.
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
    """The outcome of a job, None while submitit says that it has not ended."""
    return _said(job, remote) if remote.done() else None


def _said(job: Job, remote) -> Outcome:
    error = remote.exception()
    if error is None:
        return Outcome(job, *remote.result()[1:])
    # The node was lost or the time ran out: nothing was said by the job itself.
    return Outcome(job, FAILED, str(error).strip().splitlines()[-1])


class SlurmQueue:
    """The outcome of a job, None while Slurm has it queued or running.

    Submitit itself asks `sacct`: without Slurm's accounting it would wait for ever for a job that
    was cancelled or killed, and with it up to ten minutes. And a job that was preempted and queued
    again has left the word "interrupted" of its first attempt: it counts when Slurm is through.
    """

    def __init__(self):
        """Nothing is asked yet."""
        self._asked = float("-inf")
        self._states: Mapping[str, str] | None = None
        self._silent_since: dict[str, float] = {}

    def __call__(self, job: Job, remote) -> Outcome | None:
        """The outcome of the job that `remote` stands for, or None."""
        states = self._current()
        state = None if states is None else states.get(remote.job_id, "unknown")
        alive = state is None or state in ALIVE
        if remote.paths.result_pickle.exists():
            outcome = _said(job, remote)
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
        """Slurm's state of every job of this user; None if it did not answer."""
        if time.monotonic() - self._asked >= QUEUE_INTERVAL_SECONDS:
            self._states, self._asked = queue_states(), time.monotonic()
        return self._states


def queue_states() -> dict[str, str] | None:
    """State by job id of this user's jobs, those of the last minutes included; None if refused."""
    asked = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i %T"]
    try:
        answer = subprocess.run(  # noqa: S603 (no shell, no argument from outside)
            asked, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (
        dict(line.split() for line in answer.stdout.splitlines()) if not answer.returncode else None
    )
