"""Jobs on clusters: submitit's executor in this process, and Slurm with a made-up squeue."""

import contextlib
import gc
import os
import pathlib
import pickle
import signal
import stat
import subprocess
import sys
import threading
import time
import types

import pytest
import submitit

from experiments.jobs import jobs, slurm

UP = "import pathlib, sys, time; pathlib.Path(sys.argv[1], 'up').touch(); "


@pytest.fixture
def start(monkeypatch):
    """(script) -> jobs are that Python script from now on, their folder its argument."""

    def use(script):
        def fake(job, environment=None):
            return subprocess.Popen([sys.executable, "-c", script, job.folder])

        monkeypatch.setattr(jobs, "start", fake)

    return use


# submitit's debug jobs leave their logs to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_submitit_runs_the_jobs_and_brings_their_outcomes_back(tmp_path, planned, start):
    start("import sys; sys.exit('lpa' in sys.argv[1])")
    executor = submitit.AutoExecutor(folder=tmp_path / "submitit", cluster="debug")
    executor.update_parameters(**slurm.parameters(["timeout_min=5"], 2))
    outcomes = slurm.run(planned, executor, slurm.by_submitit)
    assert [(o.job, o.status) for o in outcomes] == list(
        zip(planned, ["done", "failed", "done", "failed"], strict=True)
    )
    del executor
    gc.collect()


class FakeRemote:
    """A submitted job of a cluster that loses the second and never ends the third."""

    def __init__(self, number, function, job):
        self._number, self._function, self._job = number, function, job
        self.cancelled = False

    def done(self):
        if self._number == 3:
            raise KeyboardInterrupt
        return self._number < 2

    def exception(self):
        return RuntimeError("traceback\nnode lost") if self._number == 1 else None

    def result(self):
        return jobs.Outcome(self._job, "done")

    def cancel(self):
        self.cancelled = True


class FakeExecutor:
    def __init__(self):
        self.remotes = []

    def batch(self):
        return contextlib.nullcontext()

    def submit(self, function, job):
        self.remotes.append(FakeRemote(len(self.remotes), function, job))
        return self.remotes[-1]


def test_a_lost_node_is_a_failure_and_an_interrupt_cancels_what_has_not_ended(planned):
    executor, ends = FakeExecutor(), []
    outcomes = slurm.run(planned[:2], executor, slurm.by_submitit, ends.append)
    assert [(o.status, o.detail) for o in outcomes] == [("done", ""), ("failed", "node lost")]
    executor = FakeExecutor()
    with pytest.raises(KeyboardInterrupt):
        slurm.run(planned, executor, slurm.by_submitit)
    assert [remote.cancelled for remote in executor.remotes][2:] == [True, True]


# Attempts


def call_when_up(job, action):
    """Calls in a thread once the job's process is there."""

    def wait():
        deadline = time.monotonic() + 20
        while not pathlib.Path(job.folder, "up").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_sigterm_to_the_attempt_reaches_the_job_and_whoever_handled_it_before(planned, start):
    start(f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); {UP}"
          "time.sleep(60)")  # fmt: skip
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("bypassed"))
    try:
        thread = call_when_up(planned[0], lambda: os.kill(os.getpid(), signal.SIGTERM))
        outcome = slurm.Attempt()(planned[0])
        thread.join()
        assert outcome.status == "interrupted" and heard == ["bypassed"]
        signal.raise_signal(signal.SIGTERM)
        assert heard == ["bypassed"] * 2, "put back"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_at_the_time_limit_the_job_saves_and_a_new_attempt_is_queued(planned, start):
    """As submitit does it: `checkpoint` within the handler of SIGUSR2, then an exit."""
    start(f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); {UP}"
          "time.sleep(60)")  # fmt: skip
    attempt, queued, before = slurm.Attempt(), [], signal.getsignal(signal.SIGUSR2)

    def checkpoint_and_leave(*_):
        queued.append(attempt.checkpoint(planned[0]))
        sys.exit(-1)

    signal.signal(signal.SIGUSR2, checkpoint_and_leave)
    try:
        thread = call_when_up(planned[0], lambda: os.kill(os.getpid(), signal.SIGUSR2))
        with pytest.raises(SystemExit):
            attempt(planned[0])
        thread.join()
    finally:
        signal.signal(signal.SIGUSR2, before)
    start("pass")
    again = pickle.loads(pickle.dumps(queued[0]))
    assert again.result().status == "done"


def test_an_attempt_that_fails_leaves_no_job_behind(planned, start, monkeypatch):
    start(f"import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); {UP}"
          "time.sleep(60)")  # fmt: skip
    monkeypatch.setattr(jobs, "GRACE_SECONDS", 0.1)
    attempt = slurm.Attempt()
    thread = call_when_up(planned[0], lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        attempt(planned[0])
    thread.join()
    assert slurm._ended(attempt._pid)


# Slurm's queue


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """(text or None) -> squeue answers that from now on; None: it fails."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "QUEUE_INTERVAL_SECONDS", 0.0)

    def answer(text):
        path = folder / "squeue"
        end = "exit 1" if text is None else f"echo '{text}'"
        path.write_text(f"#!/bin/sh\n{end}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return answer


@pytest.fixture
def remote(tmp_path, planned):
    """A submitted Slurm job without a result; `say(outcome status)` gives it one."""
    made = types.SimpleNamespace(job_id="7_1", exception=lambda: None)
    made.paths = types.SimpleNamespace(result_pickle=tmp_path / "7_1_result.pkl")

    def say(status):
        made.paths.result_pickle.touch()
        made.result = lambda: jobs.Outcome(planned[0], status)

    made.say = say
    return made


def test_a_job_that_slurm_has_no_more_is_over_after_some_patience(
    planned, squeue, remote, monkeypatch
):
    queue = slurm.SlurmQueue()
    for text in ("7_0 RUNNING\n7_1 RUNNING", "7_1 PENDING", "7_1 COMPLETING", None, "7_1 FAILED"):
        squeue(text)
        assert queue(planned[0], remote) is None, text
    monkeypatch.setattr(slurm, "PATIENCE_SECONDS", 0.0)
    for text, status in (("7_1 OUT_OF_MEMORY", "failed"), ("7_1 CANCELLED", "interrupted"),
                         ("7_0 RUNNING", "failed")):  # fmt: skip
        squeue(text)
        outcome = queue(planned[0], remote)
        assert outcome.status == status and "Slurm job 7_1" in outcome.detail, text
    assert outcome.detail.endswith("unknown")


def test_a_result_counts_at_once_but_an_interrupted_job_may_be_queued_again(
    planned, squeue, remote
):
    queue = slurm.SlurmQueue()
    remote.say("interrupted")
    for text in ("7_1 COMPLETING", "7_1 PENDING", "7_1 RUNNING", None):
        squeue(text)
        assert queue(planned[0], remote) is None, text
    squeue("7_1 CANCELLED")
    assert queue(planned[0], remote).status == "interrupted"
    squeue("7_1 RUNNING")
    remote.say("done")
    assert queue(planned[0], remote).status == "done"


def test_without_squeue_nothing_is_known(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert slurm.queue_states() is None
