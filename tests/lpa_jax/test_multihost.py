"""Several processes over loopback: the result is that of one, and no one outlives the others."""

import dataclasses
import signal
import threading

import numpy as np
import pytest
from absl import flags

from experiments.runtime import hosts as distributed
from experiments.runtime import runtime_log
from lpa_jax import multihost
from tests.helpers import hosts, hosts_worker

FLAGS = flags.FLAGS

SETUPS = tuple(hosts_worker.setups())
# Processes, and devices of each.
LAYOUTS = [
    (2, 1),
    pytest.param((2, 2), marks=pytest.mark.stress),
    pytest.param((4, 1), marks=pytest.mark.stress),
]


@pytest.fixture(scope="module")
def alone():
    return hosts_worker.results()


@pytest.fixture(scope="module", params=LAYOUTS, ids="{0[0]}x{0[1]}".format)
def together(request, tmp_path_factory):
    """What every one of the processes found, in one launch for all methods."""
    return trained(tmp_path_factory.mktemp("hosts"), *request.param)


def trained(folder, count, devices, *names):
    """What every one of `count` processes found of the setups with these names, or of all."""
    paths = [folder / f"{process}.npz" for process in range(count)]
    processes = hosts.launch(
        "train", count, lambda process: [str(paths[process]), *names], devices=devices
    )
    outcomes = [hosts.outcome(process, timeout=300) for process in processes]
    assert [status for status, _, _ in outcomes] == [0] * count, outcomes
    # Nothing is said where nothing is wrong.
    assert all(errors == "" for _, _, errors in outcomes), outcomes
    found = [dict(np.load(path, allow_pickle=False)) for path in paths]
    assert all(one["layout"].tolist() == [count, devices, count * devices] for one in found)
    return found


def assert_close(alone, together, name):
    """The arrays of a name are those of one process."""
    paths = {path for path in alone if path.startswith(f"{name}/")} - {f"{name}/compilations"}
    assert len(paths) > 4
    for path in paths:
        for found in together:
            np.testing.assert_allclose(found[path], alone[path], rtol=1e-5, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("name", [*SETUPS, "evaluation"])
def test_same_global_batch_gives_the_same_result_as_in_one_process(alone, together, name):
    assert_close(alone, together, name)


def test_two_devices_each_of_two_processes_give_the_same_result_too(alone, tmp_path):
    name = "cold lpa and lpl"
    found = trained(tmp_path, 2, 2, name)
    for part in (name, "evaluation"):
        assert_close(alone, found, part)
    assert found[0].keys() == found[1].keys()
    for path, values in found[0].items():
        np.testing.assert_array_equal(found[1][path], values, err_msg=path)
    first, *others = found[0][f"{name}/compilations"]
    assert first > 0 and not np.any(others)


@pytest.mark.parametrize("name", SETUPS)
def test_all_processes_hold_the_same_state_bit_for_bit(together, name):
    first, *others = together
    for path in (path for path in first if path.startswith(f"{name}/")):
        for found in others:
            np.testing.assert_array_equal(found[path], first[path], err_msg=path)


def test_perturbations_are_at_work(alone):
    kernel = "/['params']['hidden2']['dense']['kernel']"
    assert np.max(np.abs(alone["cold lpa and lpl" + kernel] - alone["erm" + kernel])) > 1e-3
    for layer in ("hidden1", "hidden2"):
        delta = alone[f"carried and free lpa/['perturbation_state'][{layer!r}]['delta']"]
        assert delta.shape[0] == hosts_worker.MANY and np.sum(np.any(delta != 0, axis=1)) > 16


@pytest.mark.parametrize("name", SETUPS)
def test_steps_after_the_first_compile_nothing_on_several_hosts(together, name):
    first, *others = together[0][f"{name}/compilations"]
    assert first > 0 and not np.any(others)


def test_every_example_is_evaluated_once(together):
    assert together[0]["evaluation/['loss'][1]"] == hosts_worker.EVALUATED


@pytest.mark.parametrize(
    ("number", "fault", "fail_at"),
    [(0, signal.SIGKILL, None), (1, signal.SIGSTOP, None), (1, None, 9)],
    ids=["killed", "stopped", "failing"],
)
def test_when_one_process_is_lost_the_other_ends_with_one_plain_line(number, fault, fail_at):
    hosts.check_fault(number, fault, fail_at)


def test_a_process_that_never_comes_is_not_waited_for_longer_than_asked():
    hosts.check_absent_peer(0)


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
    distributed.define_flags()
    yield lambda *arguments: FLAGS(["test", *arguments])
    for name in ("multihost", *(field.name for field in dataclasses.fields(distributed.Hosts))):
        delattr(FLAGS, name)
    FLAGS.unparse_flags()


def test_flags_say_how_processes_find_each_other(parsed):
    parsed()
    assert distributed.from_flags() is None
    parsed("--coordinator_address=here:1", "--num_processes=2", "--process_id=1")
    assert distributed.from_flags() == distributed.Hosts("here:1", 2, 1)


def test_a_missing_flag_is_named_unless_the_cluster_knows_it(parsed):
    parsed("--num_processes=2", "--process_id=1")
    with pytest.raises(ValueError, match="--coordinator_address is missing: a run of several"):
        distributed.from_flags()
    parsed("--multihost", "--heartbeat_timeout=7")
    found = distributed.from_flags()
    assert (found.coordinator_address, found.num_processes, found.heartbeat_timeout) == (None, 2, 7)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted: the same command resumes the run"),
        (SystemExit("error: no room"), 1, "error: no room"),
        (ValueError("--flag: is wrong"), 1, "error: --flag: is wrong"),
        (RuntimeError("Gloo all-reduce failed"), 1, f"error: {distributed.LOST}"),
    ],
)
def test_who_leaves_several_processes_says_why_and_waits_for_nobody(
    monkeypatch, capfd, error, status, line
):
    ends = []
    monkeypatch.setattr(distributed.os, "_exit", ends.append)
    distributed._leave(error)
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
            with distributed._ended_by_sigint():
                assert signal.getsignal(signal.SIGINT) == within
            assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_a_wait_that_takes_too_long_ends_the_process_and_one_in_time_does_not(monkeypatch, capfd):
    ended = threading.Event()
    monkeypatch.setattr(distributed.os, "_exit", lambda status: ended.set())
    with distributed._ended_after(30):
        pass
    with distributed._ended_after(0.01):
        assert ended.wait(10)
    line = "error: not all processes joined within --initialization_timeout=0.01 s"
    assert capfd.readouterr().err == f"{runtime_log.LAST_LINE}{line}\n"


def test_a_session_of_one_process_changes_nothing():
    with pytest.raises(KeyError), distributed.session(None):
        raise KeyError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("here:1", 2, 2), "process_id must lie in 0..1, got 2"),
        (("here:1", 2, -1), "process_id must lie in 0..1, got -1"),
        (("here:1", 0, 0), "num_processes must be >= 1, got 0"),
        (("here", 2, 0), "coordinator_address must be host:port, got 'here'"),
        (("here:99999", 2, 0), "coordinator_address must be host:port, got 'here:99999'"),
        (("here:1", 2, 0, 0), "initialization_timeout must be a whole number of seconds >= 1"),
        (("here:1", 2, 0, 1, 0), "heartbeat_timeout must be a whole number of seconds >= 1"),
        # JAX has started already; a call that got as far as it would wait for process 1.
        (("here:1", 2, 0), "the processes cannot be joined: jax.distributed.initialize"),
    ],
)
def test_bad_arguments_are_refused_before_anyone_waits(alone, arguments, message):
    names = ("coordinator_address", "num_processes", "process_id")
    names += ("initialization_timeout", "heartbeat_timeout")
    with pytest.raises(ValueError, match=message) as refusal:
        multihost.connect(**dict(zip(names, arguments, strict=False)))
    assert "\n" not in str(refusal.value)
