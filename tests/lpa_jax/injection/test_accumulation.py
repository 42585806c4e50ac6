"""Gradient accumulation: micro-batches against the whole batch, and against as many devices."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lpa_jax
from lpa_jax.injection.accumulation import accumulate
from lpa_jax.models import MLP
from tests.helpers import toy

STEPS = 3
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
# Cut into 2 and 3 parts: class 1 is in the first half only, class 2 in one third only.
LABELS = np.array([0, 1, 1, 0, 1, 0, 2, 2, 0, 0, 2, 2], np.int32)
CONFIDENCE = lpa_jax.by_confidence(kappa=1.0, ema=0.5)
PLANS = {
    "cold lpa and lpl": {"hidden1": lpa_jax.lpa(0.3, steps=2, assignment=CONFIDENCE),
                         "logits": lpa_jax.lpl(0.3, steps=1, assignment=CONFIDENCE)},
    "carried and free lpa": {"input": lpa_jax.lpa(0.3, mode="carry", assignment=CONFIDENCE),
                             "hidden2": lpa_jax.lpa(0.3, mode="free", assignment=CONFIDENCE)},
    "mixup of the whole batch": {"hidden1": lpa_jax.manifold_mixup(alpha=1.0)},
}  # fmt: skip


def trained(model, perturbations, step_of=jax.jit, steps=STEPS):
    step = step_of(functools.partial(lpa_jax.lpa_step, perturbations=perturbations))
    batch = toy.batch(LABELS)
    state = lpa_jax.TrainState.create(model, OPTIMIZER, jax.random.key(0), batch, perturbations)
    metrics = []
    for seed in range(steps):
        state, pairs = step(state, toy.batch(LABELS, seed))
        metrics.append(pairs)
    return {
        "params": state.params,
        "statistics": state.model_state,
        "perturbations": state.perturbation_state,
        "metrics": metrics,
    }


@functools.cache
def unperturbed():
    return trained(MLP(toy.CLASSES, hidden=(8, 6)), {})["params"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "carried and free lpa" else [])
        for name in PLANS
    ],
)
def test_accumulated_step_is_the_step_of_the_whole_batch(name):
    model = MLP(toy.CLASSES, hidden=(8, 6))
    whole = trained(model, PLANS[name])
    parts = trained(accumulate(model, 3), PLANS[name])
    toy.assert_trees_close(parts, whole, rtol=1e-5, atol=2e-6)
    changed = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), whole["params"], unperturbed())
    assert max(jax.tree.leaves(changed)) > 1e-3


def on_devices(count):
    """`count` devices, played by vmap: statistics of their own, as without synchronisation."""

    def step_of(step):
        def mapped(state, batch):
            mapped_step = functools.partial(step, axis_name="devices")
            results = jax.vmap(mapped_step, in_axes=(None, 0), axis_name="devices")(state, batch)
            return jax.tree.map(lambda values: values[0], results)

        compiled = jax.jit(mapped)
        return lambda state, batch: compiled(state, lpa_jax.parallel.shard_batch(batch, count))

    return step_of


def test_parts_are_to_batch_norm_and_dropout_what_devices_are():
    model = toy.NormalizedMLP(toy.CLASSES, dropout=0.3)
    perturbations = {"hidden1": lpa_jax.lpa(0.3, steps=1, assignment=CONFIDENCE)}
    devices = trained(model, perturbations, on_devices(2))
    parts = trained(accumulate(model, 2), perturbations)
    toy.assert_trees_close(parts, devices, rtol=1e-5, atol=2e-6)
    passes = parts["statistics"]["counters"]["hidden1"]["passes"]
    assert passes == STEPS


class Wild(nn.Module):
    """A module that was never made to be cut."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6, name="below")(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(toy.CLASSES, name="above")(nn.relu(x))


def test_injected_modules_accumulate_and_count_their_statistics_once():
    perturbations = {"norm": lpa_jax.lpa(0.3, steps=1, assignment=CONFIDENCE)}
    model = lpa_jax.inject(Wild(), "norm")
    devices = trained(model, perturbations, on_devices(2), steps=1)
    parts = trained(accumulate(model, 2), perturbations, steps=1)
    toy.assert_trees_close(parts, devices, rtol=1e-5, atol=2e-6)


def temporary_bytes(micro_batches):
    perturbations = {"hidden1": lpa_jax.lpa(0.1, steps=1, assignment=lpa_jax.all_positive())}
    model = accumulate(MLP(toy.CLASSES, hidden=(16, *[128] * 4)), micro_batches)
    batch = toy.batch(np.arange(2048) % toy.CLASSES)
    state = lpa_jax.TrainState.create(model, optax.sgd(0.1), jax.random.key(0), batch)
    state = state.replace(perturbation_state={"hidden1": {}})
    step = functools.partial(lpa_jax.lpa_step, perturbations=perturbations)
    return jax.jit(step).lower(state, batch).compile().memory_analysis().temp_size_in_bytes


def test_eight_parts_take_a_fraction_of_the_memory():
    assert temporary_bytes(8) < temporary_bytes(1) / 2


def test_evaluation_runs_all_at_once_and_one_part_is_the_network_itself():
    model = MLP(toy.CLASSES, hidden=(8,))
    batch = toy.batch(LABELS[:5])
    whole, parts = (
        lpa_jax.TrainState.create(m, OPTIMIZER, jax.random.key(0), batch)
        for m in (model, accumulate(model, 4))
    )
    toy.assert_trees_equal(lpa_jax.eval_step(whole, batch), lpa_jax.eval_step(parts, batch))
    assert accumulate(whole.network, 1) is whole.network


@pytest.mark.parametrize("bad", [0, -1, 1.5, "2"])
def test_bad_number_of_parts_is_refused(bad):
    with pytest.raises(
        ValueError, match=rf"micro_batches must be a whole number >= 1, got {bad!r}"
    ):
        accumulate(MLP(3), bad)


def test_batch_that_does_not_divide_is_refused_with_the_numbers():
    batch = toy.batch(LABELS)
    state = lpa_jax.TrainState.create(
        accumulate(MLP(toy.CLASSES, hidden=(3,)), 5), OPTIMIZER, jax.random.key(0), batch
    )
    with pytest.raises(ValueError, match="micro_batches=5 must divide the 12 examples"):
        jax.eval_shape(lpa_jax.lpa_step, state, jax.tree.map(jnp.asarray, batch))
