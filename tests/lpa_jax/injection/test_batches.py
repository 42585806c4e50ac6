"""Batches are pytrees of arrays with names of the user's: every part of the library reads them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lpa_jax
from lpa_jax import data, diagnostics, injection, parallel
from lpa_jax.checkpoints.checkpoints import Checkpoints
from tests.helpers import toy
from tests.helpers.toy import CLASSES, LABELS

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 9, (LABELS.size, 5))
MASK = (RNG.uniform(size=IDS.shape) < 0.7).astype("float32")


class Tokens(nn.Module):
    """Takes a dictionary, as the inputs are given."""

    ids: str = "ids"
    mask: str = "mask"

    @nn.compact
    def __call__(self, inputs, train=False):
        hidden = nn.Embed(9, 8, name="embed")(inputs[self.ids]) * inputs[self.mask][..., None]
        return nn.Dense(CLASSES, name="head")(hidden.mean(1))


PERTURBATIONS = {"embed": lpa_jax.lpa(0.2, steps=1, assignment=lpa_jax.all_positive())}
# (network, its batch): the same model and examples under three choices of names.
CHOICES = {
    "tree": (lpa_jax.inject(Tokens(), "embed"),
             {"image": {"ids": IDS, "mask": MASK}, "label": LABELS}),
    "renamed": (lpa_jax.with_batch_names(lpa_jax.inject(Tokens(), "embed"), "tokens", "y"),
                {"tokens": {"ids": IDS, "mask": MASK}, "y": LABELS}),
    "flat": (
        lpa_jax.with_batch_names(
            lpa_jax.inject(Tokens("input_ids", "mask"), "embed"), ("input_ids", "mask"), "labels"
        ),
        {"input_ids": IDS, "mask": MASK, "labels": LABELS},
    ),
}  # fmt: skip
every_choice = pytest.mark.parametrize("name", CHOICES)


def start(network, batch):
    return lpa_jax.TrainState.create(
        network, optax.sgd(0.1), jax.random.key(0), batch, PERTURBATIONS
    )


STEP = functools.partial(lpa_jax.lpa_step, perturbations=PERTURBATIONS)
EVALUATE = jax.jit(lpa_jax.eval_step)


@functools.cache
def expected():
    network, batch = CHOICES["tree"]
    state, pairs = jax.jit(STEP)(start(network, batch), batch)
    return state.params, pairs, EVALUATE(state, batch)


@pytest.mark.parametrize(("name", "parts"), [("tree", 2), ("renamed", 1), ("flat", 2)])
def test_steps_and_evaluation_read_the_entries_by_name(name, parts):
    network, batch = CHOICES[name]
    state, pairs = jax.jit(STEP)(start(injection.accumulate(network, parts), batch), batch)
    params, expected_pairs, evaluated = expected()
    toy.assert_trees_close(state.params, params)
    toy.assert_trees_close(pairs, expected_pairs)
    toy.assert_trees_close(EVALUATE(state, batch), evaluated)


@every_choice
def test_shards_placed_ahead_are_the_batch(name):
    network, batch = CHOICES[name]
    mapped = parallel.pmap_step(STEP, devices=jax.devices()[:1])
    with data.Prefetched([batch] * 2, mapped.place) as ahead:
        state, _ = mapped(start(network, batch), ahead[0])
    toy.assert_trees_close(state.params, expected()[0])
    shards = parallel.shard_batch(batch, 2)
    leaves = zip(jax.tree.leaves(shards), jax.tree.leaves(batch), strict=True)
    for shard, whole in leaves:
        np.testing.assert_array_equal(np.concatenate(shard), whole)
    bad = {**batch, injection.names_of(network).labels: np.where(LABELS == 0, CLASSES, LABELS)}
    with pytest.raises(ValueError, match=f"labels must be in 0..{CLASSES - 1} or -1, got"):
        mapped(state, bad)


@pytest.mark.parametrize("name", ["renamed", "flat"])
def test_diagnostics_read_them_as_well(name):
    network, batch = CHOICES[name]
    variables = network.init(jax.random.key(0), injection.read_batch(network, batch)["image"])
    observe = functools.partial(diagnostics.observe, rng=jax.random.key(0))
    seen = observe(network, variables, batch, PERTURBATIONS)["embed"]
    tree, plain = CHOICES["tree"]
    toy.assert_trees_close(
        seen.delta, observe(tree, variables, plain, PERTURBATIONS)["embed"].delta
    )
    radius = lpa_jax.suggest_radius(
        network, variables, batch, "embed", target=0.01, assignment=lpa_jax.all_positive(), steps=1
    )
    again = {"embed": lpa_jax.lpa(radius, steps=1, assignment=lpa_jax.all_positive())}
    effect = diagnostics.perturbation_effect(
        network, variables, {"embed": {}}, batch, perturbations=again,
        loss=lpa_jax.cross_entropy, rng=jax.random.key(0),
    )  # fmt: skip
    change = lpa_jax.metrics.compute(effect)["embed/loss_change/positive"]
    assert 0.005 < change < 0.02  # a mean over examples; the target is one over classes
    objective = diagnostics.activation_objective(network, variables, [batch], "embed")
    assert np.all(np.isfinite(objective.base[:3]))
    assert np.isfinite(diagnostics.weight_objective(network, variables, [batch]).base)


def test_a_state_is_restored_for_such_batches(tmp_path):
    network, batch = CHOICES["flat"]
    state, _ = jax.jit(STEP)(start(network, batch), batch)
    saved = Checkpoints(tmp_path / "checkpoints")
    saved.save(1, state)
    restored = saved.restore(start(network, batch)).state
    step = jax.jit(STEP)
    toy.assert_trees_close(step(restored, batch)[0].params, step(state, batch)[0].params, rtol=0)


@pytest.mark.parametrize(
    ("network", "batch", "message"),
    [
        ("tree", {"image": IDS}, r"batch must have an entry 'label', got image; .*names"),
        ("flat", {"mask": MASK, "labels": LABELS}, r"must have an entry 'input_ids', got mask"),
        ("tree", [IDS, LABELS], r"batch must be a dictionary of arrays, got list$"),
        ("tree", {"image": {"ids": IDS, "mask": MASK[:4]}, "label": LABELS},
         r"batch\['image'\]\['mask'\] must have 6 examples like batch\['image'\]\['ids'\]"),
        ("renamed", {"tokens": {"ids": IDS, "mask": MASK}, "y": LABELS[:5]},
         r"batch\['y'\] must have 6 examples like batch\['tokens'\]\['ids'\], got shape \(5,\)$"),
        ("tree", {"image": {"ids": IDS, "mask": 1.0}, "label": LABELS},
         r"batch\['image'\]\['mask'\] must be an array with the example axis first, got 1.0"),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_read_is_refused_in_one_line(network, batch, message):
    state = start(*CHOICES[network])
    for run in (STEP, lpa_jax.eval_step):
        with pytest.raises(ValueError, match=message):
            run(state, batch)


def test_inputs_of_several_arrays_cannot_be_perturbed_themselves():
    network, batch = CHOICES["tree"]
    with pytest.raises(ValueError, match=r"layer 'input' must be one array .* dict: perturb"):
        lpa_jax.TrainState.create(
            network, optax.sgd(0.1), jax.random.key(0), batch, {"input": lpa_jax.lpa(0.1)}
        )
    with pytest.raises(ValueError, match=r"inputs must be the name of an entry or a tuple"):
        lpa_jax.with_batch_names(network, inputs=3)


def test_a_model_with_synchronised_statistics_is_measured():
    names = {"dropout": 0.0, "axis_name": "batch"}
    local, synced = toy.NormalizedMLP(CLASSES), toy.NormalizedMLP(CLASSES, **names)
    batch = toy.batch()
    variables = injection.as_network(local).init(jax.random.key(0), batch["image"])
    options = {"target": 0.05, "assignment": lpa_jax.all_positive(), "steps": 1}
    found = lpa_jax.suggest_radius(
        synced, variables, batch, "hidden1", axis_name="batch", **options
    )
    np.testing.assert_allclose(
        found, lpa_jax.suggest_radius(local, variables, batch, "hidden1", **options), rtol=1e-5
    )
    perturbations = {"hidden1": lpa_jax.lpa(0.3, steps=1, assignment=lpa_jax.all_positive())}
    observe = functools.partial(
        diagnostics.observe, perturbations=perturbations, rng=jax.random.key(0), train=True
    )

    @jax.jit
    def deltas(shards):
        def on_one(shard):
            network = injection.as_network(synced)
            return observe(network, variables, shard, axis_name="batch")["hidden1"].delta

        whole = observe(injection.as_network(local), variables, batch)["hidden1"].delta
        return whole, jnp.concatenate(jax.vmap(on_one, axis_name="batch")(shards))

    whole, on_two = deltas(parallel.shard_batch(batch, 2))
    np.testing.assert_allclose(on_two, whole, rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(whole) > 0.1
