"""Penalties and sharpness-aware optimizers in a training step, against hand-written gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lpa_jax
from lpa_jax import optimizers
from lpa_jax.losses import cross_entropy
from lpa_jax.models import MLP
from lpa_jax.penalties import Penalty
from tests.helpers import toy

LEARNING_RATE = 0.5
MODEL = MLP(num_classes=toy.CLASSES, hidden=(5,))
BATCH = {**toy.batch(), "domain": np.array([0, 0, 0, 1, 1, 1], np.int32)}


def domain_gap(layer="hidden1"):
    """Squared difference between the two domains' mean features; counts its calls."""

    def init(shapes, num_classes):
        assert shapes[layer].shape[1:] == (5,) and num_classes == toy.CLASSES
        return jnp.zeros((), jnp.int32)

    def apply(state, observed):
        def mean(domain):
            members = (observed.domain == domain).astype(jnp.float32)[:, None]
            total = observed.global_sum(jnp.sum(members * observed.features[layer], axis=0))
            return total / observed.global_sum(jnp.sum(members))

        return jnp.sum((mean(0) - mean(1)) ** 2), state + 1

    return Penalty("domain_gap", (layer,), init, apply)


def make_state(optimizer, perturbations=None, penalties=None):
    return lpa_jax.TrainState.create(
        MODEL, optimizer, jax.random.key(0), BATCH, perturbations, penalties
    )


def stepped(state, **options):
    """State and metrics after a compiled step."""
    return jax.jit(functools.partial(lpa_jax.lpa_step, **options))(state, BATCH)


def features_and_logits(params):
    network = lpa_jax.injection.as_network(MODEL)
    features = lpa_jax.encode(network, {"params": params}, BATCH["image"], "hidden1")
    return features, lpa_jax.decode(network, {"params": params}, features, "hidden1")


def objective(params):
    features, logits = features_and_logits(params)
    losses = cross_entropy(logits, jax.nn.one_hot(BATCH["label"], toy.CLASSES))
    gap = jnp.sum((jnp.mean(features[:3], axis=0) - jnp.mean(features[3:], axis=0)) ** 2)
    return jnp.mean(losses) + gap, gap


@functools.cache
def with_gap():
    """The penalties, the first state, and state and metrics after a step."""
    penalties = {"gap": domain_gap()}
    state = make_state(optax.sgd(LEARNING_RATE), penalties=penalties)
    return penalties, state, *stepped(state, penalties=penalties)


def test_a_step_descends_mean_loss_plus_penalty():
    _, state, after, pairs = with_gap()
    gradient, gap = jax.jit(jax.grad(objective, has_aux=True))(state.params)
    expected = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, state.params, gradient)
    toy.assert_trees_close(after.params, expected)
    np.testing.assert_allclose(pairs["penalty/gap"][0], gap, rtol=1e-5)
    assert int(after.penalty_state["gap"]) == 1


def test_the_gradient_of_a_penalty_over_shards_is_that_of_the_whole_batch():
    """vmap with an axis name stands for two devices; each has its own mix of domains."""
    penalties, state, whole, _ = with_gap()
    order = np.array([0, 3, 1, 2, 4, 5])
    shards = {k: v[order].reshape(2, 3, *v.shape[1:]) for k, v in BATCH.items()}
    step = functools.partial(lpa_jax.lpa_step, penalties=penalties, axis_name="batch")
    sharded, _ = jax.jit(jax.vmap(step, (None, 0), axis_name="batch"))(state, shards)
    toy.assert_trees_close(jax.tree.map(lambda p: p[0], sharded.params), whole.params)
    toy.assert_trees_close(jax.tree.map(lambda p: p[1], sharded.params), whole.params)


def test_a_penalty_sees_the_perturbed_features_and_the_live_head():
    """decode reaches the parameters: the head's kernel moves by a penalty on decode alone."""

    def apply(state, observed):
        return jnp.sum(observed.decode("hidden1", observed.features["hidden1"])), (
            observed.features["hidden1"]
        )

    penalty = Penalty("sum", ("hidden1",), lambda shapes, c: jnp.zeros((6, 5)), apply)
    shift = lpa_jax.perturbations.stateless("shift", lambda s: (s.activation + 1.0, s.targets))
    kwargs = {"perturbations": {"hidden1": shift}, "penalties": {"sum": penalty}}
    state = make_state(optax.sgd(1.0), **kwargs)
    after, _ = stepped(state, **kwargs, loss=lambda z, t: jnp.zeros(z.shape[:1]))
    seen = after.penalty_state["sum"]
    np.testing.assert_allclose(seen, features_and_logits(state.params)[0] + 1.0, rtol=1e-6)
    moved = jax.tree.map(jnp.subtract, state.params["logits"], after.params["logits"])
    kernel = next(leaf for leaf in jax.tree.leaves(moved) if leaf.ndim == 2)
    np.testing.assert_allclose(kernel, np.tile(np.sum(seen, 0)[:, None], (1, 4)), rtol=1e-5)


def test_sam_takes_the_gradient_at_the_displaced_parameters():
    rho = 0.3
    state = make_state(optimizers.sam(optax.sgd(LEARNING_RATE), rho))
    after, _ = stepped(state)

    @jax.jit
    @jax.grad
    def gradient_at(params):
        logits = features_and_logits(params)[1]
        return jnp.mean(cross_entropy(logits, jax.nn.one_hot(BATCH["label"], toy.CLASSES)))

    gradient = gradient_at(state.params)
    scale = rho / optax.tree.norm(gradient)
    displaced = jax.tree.map(lambda p, g: p + scale * g, state.params, gradient)
    expected = jax.tree.map(
        lambda p, g: p - LEARNING_RATE * g, state.params, gradient_at(displaced)
    )
    toy.assert_trees_close(after.params, expected)


def test_sam_on_two_shards_is_sam_on_the_whole_batch():
    perturbations = {"hidden1": lpa_jax.lpa(radius=0.3, assignment=lpa_jax.all_positive())}
    state = make_state(optimizers.sam(optax.sgd(LEARNING_RATE), 0.3), perturbations)
    whole, _ = stepped(state, perturbations=perturbations)
    shards = {k: np.reshape(v, (2, 3, *np.shape(v)[1:])) for k, v in BATCH.items()}
    step = functools.partial(lpa_jax.lpa_step, perturbations=perturbations, axis_name="batch")
    sharded, _ = jax.jit(jax.vmap(step, (None, 0), axis_name="batch"))(state, shards)
    toy.assert_trees_close(jax.tree.map(lambda p: p[1], sharded.params), whole.params)


def test_post_hoc_adjustment_changes_what_evaluation_sees():
    state = make_state(optax.sgd(1.0))
    plain = lpa_jax.eval_step(state, BATCH)
    moved = lpa_jax.eval_step(
        state, BATCH, adjust_logits=lambda z: z + 100.0 * jax.nn.one_hot(1, toy.CLASSES)[None]
    )
    assert float(moved["accuracy"][0]) == np.sum(BATCH["label"] == 1)
    assert float(plain["loss"][0]) != float(moved["loss"][0])


@pytest.mark.parametrize(
    ("created", "used", "message"),
    [
        ({}, {"gap": domain_gap()}, r"penalties name 'gap', but the state was created with \[\]"),
        ({}, {"gap": "coral"}, r"penalties\['gap'\] must be a Penalty, got str"),
        ({"gap": domain_gap("hidden9")}, {}, "unknown layer 'hidden9'; the injection points are"),
    ],
)
def test_bad_penalties_are_refused_in_one_line(created, used, message):
    with pytest.raises(ValueError, match=message):
        lpa_jax.lpa_step(make_state(optax.sgd(1.0), penalties=created), BATCH, penalties=used)
