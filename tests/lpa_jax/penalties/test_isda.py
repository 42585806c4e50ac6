"""ISDA: its running covariances, its bound and its reading of the network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lpa_jax import TrainState, encode, losses, lpa_step, penalties
from lpa_jax.models import MLP
from tests.helpers.penalty_reference import (
    BATCH,
    CLASSES,
    LABELS,
    STEP,
    WIDTH,
    Pass,
    assert_close,
    assert_finite,
    augmented_logits,
    batches,
    class_covariances,
    entropy,
    forward,
    make_batch,
    make_params,
    observe,
    problem,
    reference_isda,
    run,
    single,
)


@pytest.mark.parametrize("diagonal", [False, True])
def test_isda_covariances_over_batches_are_those_of_all_the_data(diagonal):
    state, passes = None, []
    for batch in batches():
        before = state
        _, state, _ = run("isda", batch, state, diagonal=diagonal)
        passes.append(forward(make_params(), batch))
    features = np.concatenate([p.features for p in passes])
    labels = np.concatenate([p.labels for p in passes])
    expected = class_covariances(features, labels)
    if diagonal:
        expected = np.diagonal(expected, axis1=1, axis2=2)
    assert_close(state["covariance"], expected, atol=1e-6)
    assert_close(state["mean"], [features[labels == c].mean(axis=0) for c in range(CLASSES)])
    np.testing.assert_array_equal(state["count"], np.bincount(labels))
    for key in state:  # classes 1 and 2 are absent from the last batch
        np.testing.assert_array_equal(state[key][1:3], before[key][1:3])


def test_isda_diagonal_drops_the_covariances_between_features():
    seen = forward(make_params(), make_batch())
    covariances = class_covariances(seen.features, seen.labels) * np.eye(WIDTH)
    np.testing.assert_allclose(
        run("isda", diagonal=True)[0], reference_isda(seen, covariances), rtol=1e-4
    )


def test_isda_with_more_classes_than_examples_keeps_to_the_equation():
    labels = np.array([2, 0, 2], np.int32)
    batch = make_batch(labels=labels, domain=labels)
    seen = forward(make_params(), batch)
    value, _, gradient = run("isda", batch)
    np.testing.assert_allclose(
        value, reference_isda(seen, class_covariances(seen.features, labels)), rtol=1e-4
    )
    assert_finite(gradient)


def test_isda_strength_grows_with_the_step_and_stops_at_the_end():
    seen = forward(make_params(), make_batch())
    covariances = class_covariances(seen.features, seen.labels)
    for step, ratio in [(0, 0.0), (250, 0.5), (1000, 2.0), (3000, 2.0)]:
        expected = reference_isda(seen, covariances, ratio)
        np.testing.assert_allclose(run("isda", step=step)[0], expected, rtol=1e-4, atol=1e-6)


def test_isda_bounds_the_expected_loss_of_augmented_features():
    seen = forward(make_params(), make_batch())
    covariances = class_covariances(seen.features, seen.labels)
    generator, ratio, draws = np.random.default_rng(0), 0.5, 4000
    expected = 0.0
    for z, y in zip(seen.logits, seen.labels, strict=True):
        noise = generator.multivariate_normal(np.zeros(WIDTH), ratio * covariances[y], draws)
        expected += np.mean([entropy(z + e @ seen.head, y) for e in noise]) / BATCH
    bound = float(run("isda", step=250)[0]) + seen.losses.mean()
    assert seen.losses.mean() + 0.05 < expected < bound < expected + 0.15


def test_isda_augments_the_training_loss_whichever_it_is():
    """With a loss that is the square of cross entropy, the objective is that loss of z'."""
    penalty, state, _ = problem("isda")

    @jax.jit
    def objective(params, batch):
        observed = observe(params, batch, loss=lambda z, t: losses.cross_entropy(z, t) ** 2)
        return penalty.apply(state, observed)[0] + jnp.mean(observed.losses)

    seen = forward(make_params(), make_batch())
    z = augmented_logits(seen, class_covariances(seen.features, seen.labels), 2.0 * STEP / 1000)
    expected = np.mean([entropy(row, y) ** 2 for row, y in zip(z, LABELS, strict=True)])
    actual = objective(single(make_params()), single(make_batch()))
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_isda_reads_the_head_and_features_of_a_model_in_a_step():
    model = MLP(num_classes=CLASSES, hidden=(5, WIDTH))
    images = np.random.default_rng(4).normal(size=(BATCH, 2, 2, 1)).astype(np.float32)
    batch = {"image": images, "label": LABELS}
    methods = {"isda": penalties.isda("hidden2", total_steps=1000, strength=2.0)}
    state = TrainState.create(
        model, optax.sgd(0.1), jax.random.key(0, impl="rbg"), batch, penalties=methods
    )
    variables = {"params": state.params}
    features = np.asarray(encode(state.network, variables, images, "hidden2"), np.float64)
    head = np.asarray(state.params["logits"]["dense"]["kernel"], np.float64)
    logits = features @ head + np.asarray(state.params["logits"]["dense"]["bias"])
    values = np.array([entropy(z, y) for z, y in zip(logits, LABELS, strict=True)])
    seen = Pass(features, logits, values, LABELS, None, head)
    step = jax.jit(functools.partial(lpa_step, penalties=methods))
    _, pairs = step(state.replace(step=jnp.asarray(STEP)), batch)
    expected = reference_isda(seen, class_covariances(features, LABELS))
    np.testing.assert_allclose(pairs["penalty/isda"][0], expected, rtol=1e-4)
