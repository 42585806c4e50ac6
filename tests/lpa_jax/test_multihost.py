"""Several processes over loopback: the result is that of one, and no one outlives the others."""

import signal

import numpy as np
import pytest

from lpa_jax import multihost
from tests.helpers import hosts, hosts_worker

# The slow test trains the others.
SETUPS = ("carried and free lpa",)
# Processes, and devices of each.
LAYOUTS = [
    (2, 1),
    pytest.param((2, 2), marks=pytest.mark.stress),
    pytest.param((4, 1), marks=pytest.mark.stress),
]


@pytest.fixture(scope="module")
def alone():
    return hosts_worker.results(*SETUPS)


@pytest.fixture(scope="module", params=LAYOUTS, ids="{0[0]}x{0[1]}".format)
def together(request, tmp_path_factory):
    """What every one of the processes found, in one launch for all methods."""
    return trained(tmp_path_factory.mktemp("hosts"), *request.param, *SETUPS)


def trained(folder, count, devices, *names):
    """What every one of `count` processes found of the setups with these names."""
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


@pytest.mark.slow
def test_two_devices_each_of_two_processes_give_the_same_result_too(tmp_path):
    name = "cold lpa and lpl"
    others = ("erm", "carried lpa, spread")
    alone = hosts_worker.results(name, *others)
    kernel = "/['params']['hidden2']['dense']['kernel']"
    assert np.max(np.abs(alone[name + kernel] - alone["erm" + kernel])) > 1e-3
    found = trained(tmp_path, 2, 2, name, *others)
    for part in (name, *others, "evaluation"):
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
    [
        pytest.param(0, signal.SIGKILL, None, id="killed"),
        pytest.param(1, signal.SIGSTOP, None, id="stopped", marks=pytest.mark.slow),
        pytest.param(1, None, 9, id="failing", marks=pytest.mark.slow),
    ],
)
def test_when_one_process_is_lost_the_other_ends_with_one_plain_line(number, fault, fail_at):
    hosts.check_fault(number, fault, fail_at)


@pytest.mark.slow
def test_a_process_that_never_comes_is_not_waited_for_longer_than_asked():
    hosts.check_absent_peer(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("here:1", 2, 2), "process_id must be a whole number in 0..1, got 2"),
        (("here:1", 2, -1), "process_id must be a whole number in 0..1, got -1"),
        (("here:1", 0, 0), "num_processes must be a whole number >= 1, got 0"),
        (("here", 2, 0), "coordinator_address must be host:port, got 'here'"),
        (("here:99999", 2, 0), "coordinator_address must be host:port, got 'here:99999'"),
        (("here:1", 2, 0, 0), "initialization_timeout must be a whole number >= 1"),
        (("here:1", 2, 0, 1, 0), "heartbeat_timeout must be a whole number >= 1"),
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
