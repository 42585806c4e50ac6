"""Examples with label -1 or mask 0 do not count: a batch with them trains as one without them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lpa_jax
from lpa_jax import penalties, perturbations
from lpa_jax.models import MLP
from lpa_jax.perturbations import Site
from tests.helpers import toy

LABELS = np.array([0, 1, 1, 2, 0, 1], np.int32)
PLACES = np.array([0, 2, 3, 5, 6, 9])  # of the examples that count, among 10
OPTIMIZER = optax.sgd(0.1)
RULE = lpa_jax.by_confidence(kappa=1.0, ema=0.5)


def whole():
    return {**toy.batch(LABELS), "domain": np.array([0, 1, 0, 1, 0, 1], np.int32)}


def padded(mark):
    """The same examples with four more, marked as not counting by their label, the mask or both."""
    rng, good = np.random.default_rng(1), whole()
    images = 100.0 * rng.normal(size=(10, *toy.IMAGE)).astype(np.float32)
    labels = np.full(10, -1 if mark != "mask" else 3, np.int32)
    images[PLACES], labels[PLACES] = good["image"], LABELS
    domain = rng.integers(0, 2, 10).astype(np.int32)
    domain[PLACES] = good["domain"]
    batch = {"image": images, "label": labels, "domain": domain}
    if mark != "label":
        batch["mask"] = np.isin(np.arange(10), PLACES).astype(np.float32)
    return batch


PLANS = {
    "erm": {},
    "cold": {"hidden1": lpa_jax.lpa(0.3, assignment=RULE, radius_target=0.1)},
    "carry": {"hidden1": lpa_jax.lpa(0.3, mode="carry", assignment=RULE)},
    "free": {"hidden1": lpa_jax.lpa(0.3, mode="free", assignment=RULE)},
    "rsc": {"hidden1": lpa_jax.rsc()},
    "lpl, adversarial": {"input": lpa_jax.adversarial(0.1), "logits": lpa_jax.lpl(0.3)},
}


def steps(batch, plan, num_classes=toy.CLASSES, added=None, step=None):
    """State and metrics after two steps."""
    model = MLP(num_classes, hidden=(8, 6))
    state = lpa_jax.TrainState.create(model, OPTIMIZER, jax.random.key(0), batch, plan, added)
    step = step or jax.jit(functools.partial(lpa_jax.lpa_step, perturbations=plan, penalties=added))
    for _ in range(2):
        state, pairs = step(state, batch)
    return {
        "params": state.params,
        "perturbations": state.perturbation_state,
        "penalties": state.penalty_state,
        "metrics": pairs,
    }


def assert_equal(found, expected):
    for path, value in jax.tree_util.tree_leaves_with_path(expected):
        other = functools.reduce(
            lambda tree, key: tree[getattr(key, "key", getattr(key, "idx", None))], path, found
        )
        np.testing.assert_allclose(other, value, rtol=1e-5, atol=1e-6, err_msg=str(path))


def variants(names, slow):
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


@pytest.mark.parametrize("name", variants(PLANS, slow=("erm", "carry")))
def test_a_step_is_that_of_the_examples_that_count(name):
    step = jax.jit(functools.partial(lpa_jax.lpa_step, perturbations=PLANS[name]))
    expected = steps(whole(), PLANS[name], step=step)
    for mark in ("label", "both", "mask"):
        assert_equal(steps(padded(mark), PLANS[name], step=step), expected)


def test_a_part_takes_those_that_count_first():
    part = {"hidden1": lpa_jax.lpa(0.3, assignment=RULE, radius_target=0.1, examples=0.6)}
    assert_equal(steps(padded("mask"), part), steps(whole(), PLANS["cold"]))


@pytest.mark.parametrize("mode", variants(("cold", "carry", "free"), slow=("carry",)))
def test_with_more_classes_than_examples_too(mode):
    plan = {"hidden1": lpa_jax.lpa(0.3, mode=mode, assignment=lpa_jax.all_positive())}
    assert_equal(steps(padded("label"), plan, 40), steps(whole(), plan, 40))


def test_penalties_are_those_of_the_examples_that_count():
    added = {
        "vrex": penalties.create("vrex", num_domains=2),
        "group_dro": penalties.create("group_dro", num_domains=2),
        "irm": penalties.create("irm", num_domains=2),
        "coral": penalties.create("coral", layer="hidden2", num_domains=2),
        "isda": penalties.create("isda", layer="hidden2", total_steps=2),
        "spectral_decoupling": penalties.create("spectral_decoupling"),
    }
    found, expected = (steps(batch, {}, added=added) for batch in (padded("both"), whole()))
    assert_equal(found, expected)
    assert all(expected["metrics"][f"penalty/{name}"][0] != 0 for name in added)


@pytest.mark.parametrize("name", variants(("cold", "free"), slow=("free",)))
def test_devices_may_hold_different_numbers_of_examples_that_count(name):
    batch, plan = padded("mask"), PLANS[name]
    batch = {key: values[[0, 2, 3, 5, 6, 1, 4, 7, 8, 9]] for key, values in batch.items()}
    state = lpa_jax.TrainState.create(
        MLP(toy.CLASSES, hidden=(8, 6)), optax.sgd(0.1), jax.random.key(0), batch, plan
    )
    step = functools.partial(lpa_jax.lpa_step, perturbations=plan)
    spread = jax.vmap(
        functools.partial(step, axis_name="i"), in_axes=(None, 0), out_axes=0, axis_name="i"
    )
    shares = {key: values.reshape(2, 5, *values.shape[1:]) for key, values in batch.items()}
    (one, one_pairs), (two, two_pairs) = jax.jit(step)(state, batch), jax.jit(spread)(state, shares)
    two, two_pairs = jax.tree.map(lambda leaf: leaf[1], (two.params, two_pairs))
    assert_equal({"p": two, "m": two_pairs}, {"p": one.params, "m": one_pairs})


def test_evaluation_does_not_count_them_either():
    state = lpa_jax.TrainState.create(
        MLP(toy.CLASSES, hidden=(8,)), optax.sgd(0.1), jax.random.key(0), whole()
    )
    step = jax.jit(lpa_jax.eval_step)
    for mark in ("label", "mask", "both"):
        assert_equal(step(state, padded(mark)), step(state, whole()))


@pytest.mark.parametrize("step", [lpa_jax.lpa_step, lpa_jax.eval_step])
@pytest.mark.parametrize("bad", [-2, toy.CLASSES])
def test_another_bad_label_is_refused_or_makes_the_loss_nan(step, bad):
    batch = whole()
    state = lpa_jax.TrainState.create(
        MLP(toy.CLASSES, hidden=(8,)), optax.sgd(0.1), jax.random.key(0), batch
    )
    batch["label"] = np.where(np.arange(6) == 4, bad, LABELS)
    with pytest.raises(ValueError, match=rf"labels must be in 0..3 or -1, got {bad} at position 4"):
        step(state, batch)
    result = jax.jit(step)(state, batch)
    assert np.isnan((result if isinstance(result, dict) else result[1])["loss"][0])


def test_a_batch_in_which_nothing_counts_changes_nothing_and_is_finite():
    batch = {**whole(), "mask": np.zeros(6, np.float32)}
    plan = PLANS["cold"]
    state = lpa_jax.TrainState.create(
        MLP(toy.CLASSES, hidden=(8, 6)), optax.sgd(0.1), jax.random.key(0), batch, plan
    )
    step = jax.jit(functools.partial(lpa_jax.lpa_step, perturbations=plan))
    after, pairs = step(state, batch)
    assert_equal(after.params, state.params)
    assert pairs["loss"] == (0.0, 0.0)
    assert pairs["gradient_norm"][0] == 0.0


@pytest.mark.parametrize("method", ["manifold_mixup", "domain_mixup", "mixstyle"])
def test_an_example_that_does_not_count_is_no_partner(method):
    labels = jnp.array([0, -1, 1, -1, 2, 3, -1, 0])
    h = jnp.where(labels[:, None, None] < 0, jnp.nan, 1.0 + jnp.arange(8.0)[:, None, None])
    options = {"domain_mixup": {"num_domains": 2}, "mixstyle": {"alpha": 1.0, "probability": 1.0}}
    perturbation = getattr(perturbations, method)(**options.get(method, {}))
    moved = 0
    for seed in range(10):
        site = Site(
            activation=jnp.broadcast_to(h, (8, 3, 2)) + jnp.arange(3.0)[None, :, None],
            targets=jax.nn.one_hot(labels, 4),
            labels=labels,
            decode=None,
            loss=None,
            rng=jax.random.key(seed),
            domain=jnp.array([0, 0, 0, 0, 1, 1, 1, 1]),
        )
        applied = perturbation.apply((), site)
        counted = labels >= 0
        assert np.all(np.isfinite(applied.activation[counted]))
        np.testing.assert_allclose(np.sum(applied.targets[counted], axis=1), 1.0, rtol=1e-6)
        moved += int(not np.allclose(applied.activation[counted], site.activation[counted]))
    assert moved > 0


def test_class_perturbation_and_observe_leave_them_alone():
    h = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    labels = padded("label")["label"]

    def delta(h, labels):
        return lpa_jax.class_perturbation(
            lambda h: jnp.sum(jnp.sin(h), axis=-1), h, labels, sign=jnp.ones(4), radius=jnp.ones(4)
        )

    np.testing.assert_allclose(delta(h, labels), delta(h[PLACES], LABELS), rtol=1e-5)
    plan, batch = {"hidden1": lpa_jax.lpa(0.3, assignment=RULE)}, padded("label")
    network = lpa_jax.injection.as_network(MLP(toy.CLASSES, hidden=(8, 6)))
    variables = network.init(jax.random.key(0), batch["image"])
    observe = functools.partial(lpa_jax.diagnostics.observe, network, variables)
    seen = jax.jit(lambda batch: observe(batch, plan, rng=jax.random.key(0)))(batch)["hidden1"]
    np.testing.assert_array_equal(np.delete(seen.delta, PLACES, axis=0), 0.0)
    alone = observe(whole(), plan, rng=jax.random.key(0))["hidden1"]
    np.testing.assert_allclose(seen.delta[PLACES], alone.delta, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(alone.delta)) > 0
