"""Runs of several processes: their flags, and one plain line when a process ends or is lost."""

import signal
import threading

import pytest
from absl import flags

from experiments.runtime import hosts, runtime_log
from tests.helpers.module_call import forget_flags

FLAGS = flags.FLAGS


def test_runtime_log_passes_everything_but_the_end_of_the_run():
    lines = ["E0101 something else", "W0101 x.cc:1] more", ""]
    assert list(runtime_log.plain_lines(lines, "lost")) == lines
    fatal = f"F0101 1 2 client.h:80] {runtime_log.FATAL}. absl::Status: DEADLINE_EXCEEDED"
    trace = ["", "*** Check failure", "@"]
    found = list(runtime_log.plain_lines([lines[0], fatal, *trace], "lost"))
    assert found == [lines[0], "error: lost"]
    own = runtime_log.LAST_LINE + "error: out of data"
    assert list(runtime_log.plain_lines([fatal, own, *trace], "lost")) == ["error: out of data"]


@pytest.fixture
def parsed():
    """Parses a command line's flags about hosts."""
    hosts.define_flags()
    yield lambda *arguments: FLAGS(["test", *arguments])
    forget_flags()


def test_flags_say_how_processes_find_each_other(parsed):
    parsed()
    assert hosts.from_flags() is None
    parsed("--coordinator_address=here:1", "--num_processes=2", "--process_id=1")
    assert hosts.from_flags() == hosts.Hosts("here:1", 2, 1)


def test_a_missing_flag_is_named_unless_the_cluster_knows_it(parsed):
    parsed("--num_processes=2", "--process_id=1")
    with pytest.raises(ValueError, match="--coordinator_address is missing: a run of several"):
        hosts.from_flags()
    parsed("--multihost", "--heartbeat_timeout=7")
    found = hosts.from_flags()
    assert (found.coordinator_address, found.num_processes, found.heartbeat_timeout) == (None, 2, 7)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted: the same command resumes the run"),
        (SystemExit("error: no room"), 1, "error: no room"),
        (ValueError("--flag: is wrong"), 1, "error: --flag: is wrong"),
        (RuntimeError("Gloo all-reduce failed"), 1, f"error: {hosts.LOST}"),
    ],
)
def test_who_leaves_several_processes_says_why_and_waits_for_nobody(
    monkeypatch, capfd, error, status, line
):
    ends = []
    monkeypatch.setattr(hosts.os, "_exit", ends.append)
    hosts._leave(error)
    assert ends == [status]
    assert capfd.readouterr().err == f"{runtime_log.LAST_LINE}{line}\n"


def test_ctrl_c_ends_a_wait_for_other_processes_unless_it_is_ignored():
    earlier = signal.getsignal(signal.SIGINT)
    try:
        for handler, within in (
            (signal.default_int_handler, signal.SIG_DFL),
            (signal.SIG_IGN, signal.SIG_IGN),
        ):
            signal.signal(signal.SIGINT, handler)
            with hosts._ended_by_sigint():
                assert signal.getsignal(signal.SIGINT) == within
            assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_a_wait_that_takes_too_long_ends_the_process_and_one_in_time_does_not(monkeypatch, capfd):
    ended = threading.Event()
    monkeypatch.setattr(hosts.os, "_exit", lambda status: ended.set())
    with hosts._ended_after(30):
        pass
    with hosts._ended_after(0.01):
        assert ended.wait(10)
    line = "error: not all processes joined within --initialization_timeout=0.01 s"
    assert capfd.readouterr().err == f"{runtime_log.LAST_LINE}{line}\n"


def test_a_session_of_one_process_changes_nothing():
    with pytest.raises(KeyError), hosts.session(None):
        raise KeyError
