"""Many devices: the result depends on the global batch alone, however it is spread."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lpa_jax
from lpa_jax import parallel
from lpa_jax.models import MLP
from tests.helpers import devices_worker, hosts, mappings, toy

# What is trained on 8 devices, and on how many for comparison; 0 is without a mapper.
REFERENCES = {
    "erm": "1",
    "cold lpa and lpl": "1",
    "carried and free lpa": "0",
    "more classes than examples": "1",
}


@pytest.fixture(scope="module")
def worker():
    """What `devices_worker.py` prints: every run on 8 CPU devices."""
    results = printed_by("tests.helpers.devices_worker")
    assert results["devices"] == 8
    return results


def printed_by(module):
    """What a module prints on 8 CPU devices, in a process of its own."""
    command = [sys.executable, "-W", "error", "-m", module]
    done = subprocess.run(
        command, env=hosts.environment(8), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", REFERENCES)
def test_contract_07_result_depends_on_the_global_batch_alone(worker, name):
    runs = worker["runs"][name]
    assert_nearly_the_same(runs["8"], runs[REFERENCES[name]])


def test_a_run_that_goes_on_with_another_number_of_devices_ends_where_it_would_have(worker):
    assert_nearly_the_same(worker["moved"], worker["runs"]["carried and free lpa"]["0"])


@pytest.mark.parametrize("cell", mappings.PART, ids=lambda cell: " on ".join(map(str, cell)))
def test_every_mapping_gives_the_result_of_one_device(worker, cell):
    assert_within_tolerance(worker["mappings"], [cell])


@pytest.mark.slow
def test_every_mapping_of_every_step_on_all_numbers_of_devices_gives_that_of_one_device():
    assert_within_tolerance(printed_by("tests.helpers.mappings"), mappings.TABLE)


def assert_within_tolerance(found, cells):
    found = {tuple(cell): outcome for cell, outcome in found}
    # A difference of NaN is no less than 1.
    assert not {cell: found[cell] for cell in cells if not found[cell][0] <= 1}


def test_a_state_spread_over_devices_learns_what_one_device_does(worker):
    expected = worker["runs"]["carried and free lpa"]["0"]
    assert_nearly_the_same(worker["fsdp"]["run"], expected)
    assert not any(worker["fsdp"]["run"]["compilations"][1:])


def test_large_arrays_of_a_state_are_spread_and_stay_so_after_a_step(worker):
    shards = worker["fsdp"]["shards"]
    for name in ("parameters", "momentum", "class table"):
        whole, part = map(np.prod, shards[name])
        assert whole == 4 * part, name
    assert shards["bias"][0] == shards["bias"][1]


@pytest.mark.parametrize("name", ["own pass", "observe", "suggest_radius"])
@pytest.mark.parametrize("labels", ["positions", "several classes"])
def test_a_function_on_explicit_axes_gives_the_result_of_one_device(worker, labels, name):
    assert_nearly_the_same(*reversed(worker["explicit axes"][labels][name]))


def test_a_pass_of_ones_own_on_explicit_axes_is_refused_in_one_line(worker):
    assert worker["explicit axes"]["positions"]["refusal"] == (
        "variables and batch must be on a mesh whose axes are AxisType.Auto, or your step must be "
        "decorated with lpa_jax.parallel.in_auto_axes, got AxisType.Explicit"
    )


def test_a_kernel_gradient_by_parts_sends_no_example_to_another_device(worker):
    found = worker["split convolution"]
    assert found["convolutions"] > 4  # parts
    assert found["collectives"] == ["all-reduce"]
    assert max(found["errors"]) < 2e-6


def assert_nearly_the_same(found, expected):
    """Metrics, parameters and all states, to float32 rounding."""
    assert list(found) == list(expected)
    for path in set(expected) - {"compilations"}:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-5, atol=2e-6, err_msg=path)


def test_contract_07_is_tested_on_every_spread_and_on_perturbations_that_matter(worker):
    tested = {name: {*runs} for name, runs in worker["runs"].items()}
    assert tested == {name: {count, "8"} for name, count in REFERENCES.items()}
    erm = worker["runs"]["erm"]["8"]
    for name in ("carried and free lpa", "more classes than examples"):
        run = worker["runs"][name]["8"]
        deltas = [np.array(run[path]) for path in run if "'delta'" in path]
        assert len(deltas) == 2
        assert all(np.max(np.abs(delta)) > 1e-2 for delta in deltas)
        kernel = "['params']['hidden2']['dense']['kernel']"
        assert np.max(np.abs(np.array(run[kernel]) - erm[kernel])) > 1e-3


@pytest.mark.parametrize("name", REFERENCES)
def test_steps_after_the_first_compile_nothing(worker, name):
    first, *others = worker["runs"][name]["8"]["compilations"]
    assert first > 0
    assert not any(others)


def test_class_that_never_came_is_left_alone_on_every_device(worker):
    delta = worker["runs"]["more classes than examples"]["8"]
    delta = np.array(delta["['perturbation_state']['hidden1']['delta']"])
    came = np.zeros(delta.shape[0], bool)
    came[np.add.outer(3 * np.arange(11), np.arange(3)).reshape(-1)] = True
    assert np.all(delta[~came] == 0)
    assert np.sum(np.any(delta != 0, axis=1)) > 16


def test_metrics_count_every_example_of_the_global_batch(worker):
    for name in REFERENCES:
        run = worker["runs"][name]["8"]
        for step in range(devices_worker.STEPS):
            assert run[f"['metrics {step}']['loss'][1]"] == 16.0
            assert run[f"['metrics {step}']['accuracy'][1]"] == 16.0
            assert run[f"['metrics {step}']['gradient_norm'][1]"] == 1.0


def test_whole_numbers_in_the_model_state_stay_whole(worker):
    run = worker["runs"]["cold lpa and lpl"]["8"]
    for layer in ("hidden1", "hidden2"):
        passes = run[f"['model_state']['counters']['{layer}']['passes']"]
        assert isinstance(passes, int)
        assert passes == devices_worker.STEPS


def test_local_running_statistics_are_averaged_over_devices(worker):
    found, batch = (np.array(worker["local_statistics"][key]) for key in ("means", "batch"))
    np.testing.assert_allclose(found, (1 - toy.MOMENTUM) * batch, rtol=1e-4, atol=1e-6)


def test_evaluation_on_8_devices_counts_each_example_once(worker):
    padded, whole = (worker["evaluation"][key] for key in ("padded", "whole"))
    assert list(padded) == list(whole)
    for path, values in whole.items():
        np.testing.assert_allclose(padded[path], values, rtol=1e-5, err_msg=path)
    assert padded["['loss'][1]"] == 13.0
    assert padded["['per_class_accuracy'][1]"] == [4.0, 3.0, 3.0, 3.0]


def test_devices_draw_the_same_layer(worker):
    draws = [step["used"] for step in worker["randomness"]]
    assert all(len(used) == 1 for used in draws)
    assert {used for (used,) in draws} == {"input", "hidden1"}
    for step in worker["randomness"]:
        # On all devices the pass went through the perturbation of the layer that was drawn.
        np.testing.assert_allclose(step["logits"], step["decoded"], rtol=1e-5, atol=1e-6)


def test_devices_have_keys_of_their_own(worker):
    keys = [tuple(key) for step in worker["randomness"] for key in step["keys"]]
    assert len(set(keys)) == 8 * len(worker["randomness"])
    # Dropout is the only thing that tells the 8 equal examples apart.
    for step in worker["randomness"]:
        assert len({tuple(row) for row in np.round(step["logits"], 5)}) > 4


def test_donated_state_is_gone_and_the_result_is_the_same(worker):
    *old, new = worker["donation"]["gone"]
    assert not any(new)
    assert all(all(gone) for gone in old)
    run = worker["runs"]["erm"]["8"]
    assert worker["donation"]["params"] == {path: run[path] for path in run if "'params'" in path}


def test_batch_that_does_not_split_evenly_is_refused_before_a_device_is_called(worker):
    assert worker["refusals"] == [
        f"batch['image'] has {size} examples, which do not split evenly over 8 devices"
        for size in (12, 4)
    ]


def test_shards_keep_the_order_of_the_batch():
    batch = {"image": np.arange(24).reshape(6, 2, 2), "label": np.arange(6)}
    shards = parallel.shard_batch(batch, 3)
    np.testing.assert_array_equal(shards["label"], [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(shards["image"].reshape(6, 2, 2), batch["image"])
    with pytest.raises(ValueError, match=r"batch\['image'\] has 6 examples, which do not split"):
        parallel.shard_batch(batch, 4)


@functools.cache
def state():
    return lpa_jax.TrainState.create(
        MLP(toy.CLASSES, hidden=(3,)), optax.sgd(0.1), jax.random.key(0), toy.batch()
    )


def on_a_mesh(step, **axis_names):
    return parallel.mesh_step(step, jax.make_mesh((1,), ("data",)), **axis_names)


@pytest.mark.parametrize("mapped", [parallel.pmap_step, parallel.map_step, on_a_mesh])
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("bad", [-2, toy.CLASSES])
def test_contract_10_bad_label_is_refused_before_a_device_is_called(mapped, as_array, bad):
    def never(state, batch, axis_name):
        raise AssertionError("a device was called")

    labels = np.where(np.arange(6) == 4, bad, toy.LABELS)
    with pytest.raises(ValueError, match=rf"labels must be in 0..3 or -1, got {bad} at position 4"):
        mapped(never)(state(), {**toy.batch(), "label": as_array(labels)})


@pytest.mark.parametrize("count", ["1", "2"])
def test_replicated_arguments_are_the_same_on_all_devices_and_are_not_donated(worker, count):
    run = worker["replicated"][count]
    assert run["totals"] == [1.0 + 2.0 * 28.0, 1.0 + 2.0 * 28.0, 1.0 + 3.0 * 28.0]
    assert all(run["states are gone"])
    assert not run["argument is gone"]
    # Called or bound, another value of a replicated argument compiles nothing.
    assert run["compilations after the first"] == 0


@pytest.mark.parametrize("mapped", [parallel.pmap_step, parallel.map_step, on_a_mesh])
def test_replicated_arguments_come_after_the_batch_in_the_order_of_bind_and_call(mapped):
    def step(state, batch, first, second, axis_name):
        return state.step + jnp.sum(batch["label"]) + first["value"] - second

    bound = mapped(step).bind({"value": np.float32(10)})
    assert bound(state(), toy.batch(), np.float32(4)) == 11
    assert bound.bind(np.float32(3))(state(), bound.place(toy.batch())) == 12
    bad = {**toy.batch(), "label": toy.LABELS + 2}
    with pytest.raises(ValueError, match=rf"labels must be in 0..3 or -1, got {toy.CLASSES} at"):
        bound(state(), bad, np.float32(4))


@pytest.mark.parametrize(
    ("kind", "axis_name", "message"),
    [
        ("Auto", None, r"axis_name must name the axes that the batch is .* \(data\), got None"),
        ("Explicit", "data", "that shard_map leaves out must be AxisType.Auto, got .* for model"),
    ],
)
def test_a_step_under_shard_map_that_would_be_wrong_is_refused(kind, axis_name, message):
    kinds = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=kinds)
    split, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    step = functools.partial(lpa_jax.lpa_step, axis_name=axis_name)
    specs = {"in_specs": (everywhere, split), "out_specs": everywhere, "axis_names": {"data"}}
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
    placed = jax.device_put((state(), toy.batch()), jax.sharding.NamedSharding(mesh, everywhere))
    placed[1].update(jax.device_put(toy.batch(), jax.sharding.NamedSharding(mesh, split)))
    with pytest.raises(ValueError, match=message):
        mapped(*placed)


@pytest.mark.parametrize("mapped", [parallel.pmap_step, parallel.map_step, on_a_mesh])
def test_a_batch_may_hold_random_keys(mapped):
    def step(state, batch, axis_name):
        return state.step + jnp.sum(jax.vmap(jax.random.uniform)(batch["key"]))

    keys = jax.random.split(jax.random.key(0), 6)
    expected = np.sum([jax.random.uniform(key) for key in keys])
    found = mapped(step)(state(), {**toy.batch(), "key": keys})
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_one_device_needs_no_mapper():
    axes = []

    def step(state, batch, axis_name):
        axes.append(axis_name)
        return state.step + jnp.sum(batch["label"])

    assert jax.device_count() == 1
    assert parallel.map_step(step)(state(), toy.batch()) == 5
    assert parallel.pmap_step(step)(state(), toy.batch()) == 5
    assert axes == [None, parallel.AXIS_NAME]


def test_an_array_is_split_along_its_largest_even_axis():
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    shapes = {"table": (8142, 64), "square": (64, 64), "odd": (8142, 3), "small": (8, 8), "one": ()}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    found = parallel.fsdp_shardings(tree, mesh, axis_name="data", min_size=65)
    assert {name: tuple(sharding.spec) for name, sharding in found.items()} == {
        "table": (None, "data"),
        "square": ("data",),
        "odd": (),
        "small": (),
        "one": (),
    }
    both = parallel.fsdp_shardings(tree, mesh, min_size=65)
    assert tuple(both["table"].spec) == (None, ("data", "model"))


def test_an_axis_that_the_mesh_does_not_have_is_refused():
    mesh = jax.make_mesh((1,), ("data",))
    with pytest.raises(ValueError, match="axis_names must be one of data, got 'model'"):
        on_a_mesh(lpa_jax.lpa_step, axis_names=["model"])
    with pytest.raises(ValueError, match="axis_name must be one of data, got 'model'"):
        parallel.fsdp_shardings({}, mesh, axis_name="model")
