"""Gains and local bounds: exact on linear networks, against dense Jacobians elsewhere."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lpa_jax
from lpa_jax import injection
from lpa_jax.diagnostics import gains, local_bound, observe, random_directions
from tests.helpers import toy

SHAPES = ((5, 7), (7, 4), (4, 3))
KEY = jax.random.key(0)


class LinearChain(nn.Module):
    """x W_1 W_2 W_3, cut after each product."""

    @nn.compact
    def __call__(self, x):
        for i, (_, width) in enumerate(SHAPES[:-1]):
            x = nn.Dense(width, use_bias=False, name=f"w{i + 1}")(x)
        return nn.Dense(SHAPES[-1][1], use_bias=False, name="w3")(x)


@pytest.fixture(scope="module")
def linear():
    """The network, its variables and the NumPy matrices between its layers."""
    rng = np.random.default_rng(0)
    matrices = [rng.normal(size=shape).astype(np.float32) for shape in SHAPES]
    network = injection.inject(LinearChain(), "w1", "w2")
    params = {f"w{i + 1}": {"kernel": w} for i, w in enumerate(matrices)}
    return network, {"params": params}, matrices


@pytest.fixture(scope="module")
def curved():
    network = injection.StagedNetwork(toy.NormalizedMLP(toy.CLASSES))
    images = toy.batch()["image"]
    return network, network.init(jax.random.key(1), images), images


def test_gains_on_a_linear_network_are_those_of_its_matrices(linear):
    network, variables, (first, second, third) = linear
    x, delta = np.random.default_rng(1).normal(size=(2, 6, 5)).astype(np.float32)
    found = gains(network, variables, x, "input", delta)
    assert list(found) == ["w1", "w2", "logits"]
    lengths = np.linalg.norm(delta, axis=1)
    for layer, matrix in {
        "w1": first,
        "w2": first @ second,
        "logits": first @ second @ third,
    }.items():
        expected = np.linalg.norm(delta @ matrix, axis=1) / lengths
        np.testing.assert_allclose(found[layer], expected, rtol=1e-4)


def test_the_local_bound_on_a_linear_network_is_the_largest_singular_value(linear):
    network, variables, (first, second, third) = linear
    x = np.ones((2, 5), np.float32)
    for layer, target, matrix in (
        ("input", "w1", first),
        ("input", "logits", first @ second @ third),
        ("w1", "logits", second @ third),
    ):
        bound = local_bound(network, variables, x, layer, target, rng=KEY, tolerance=1e-6)
        np.testing.assert_allclose(bound.sigma, np.linalg.svd(matrix)[1][0], rtol=1e-4)
        assert bound.relative_change.max() <= 1e-6


def test_the_top_singular_vector_reaches_the_bound_and_no_direction_exceeds_it(linear):
    network, variables, (first, *_) = linear
    left, sigma, _ = np.linalg.svd(first)
    x = np.zeros((5, 5), np.float32)
    found = gains(network, variables, x, "input", left.T.astype(np.float32))["w1"]
    np.testing.assert_allclose(found, sigma, rtol=1e-4)
    random = random_directions(KEY, jnp.ones((5, 5)))
    assert gains(network, variables, x, "input", random)["w1"].max() <= sigma[0] * (1 + 1e-5)


def test_the_local_bound_is_that_of_each_examples_own_jacobian(curved):
    network, variables, images = curved
    bound = local_bound(network, variables, images, "input", "logits", rng=KEY, tolerance=1e-6)

    def logits(image):
        return lpa_jax.encode(network, variables, image[None], "logits")[0]

    jacobians = np.asarray(jax.vmap(jax.jacrev(logits))(images)).reshape(len(images), 4, -1)
    expected = np.linalg.svd(jacobians)[1][:, 0]
    np.testing.assert_allclose(bound.sigma, expected, rtol=1e-3)
    assert np.ptp(expected) > 0.01


def test_a_small_gain_stays_below_the_local_bound(curved):
    network, variables, images = curved
    bound = local_bound(network, variables, images, "hidden1", "logits", rng=KEY, tolerance=1e-6)
    afp = lpa_jax.adversarial(1e-3)
    seen = observe(network, variables, toy.batch(), {"hidden1": afp}, rng=KEY)["hidden1"]
    for delta in (seen.delta, random_directions(KEY, seen.delta)):
        gain = gains(network, variables, images, "hidden1", delta)["logits"]
        assert np.all(np.asarray(gain) <= bound.sigma * 1.01)


def test_too_few_iterations_leave_a_lower_estimate_and_say_so(linear):
    network, variables, (first, *_) = linear
    x = np.ones((3, 5), np.float32)
    bound = local_bound(network, variables, x, "input", "w1", rng=KEY, tolerance=1e-9, iterations=2)
    assert bound.iterations == 2 and bound.relative_change.max() > 1e-9
    assert np.all(bound.sigma <= np.linalg.svd(first)[1][0] * (1 + 1e-5))


def test_examples_without_perturbation_have_no_gain(linear):
    network, variables, _ = linear
    delta = np.array([[0.0] * 5, [1.0] * 5], np.float32)
    gain = gains(network, variables, np.ones((2, 5), np.float32), "input", delta)["logits"]
    assert np.isnan(gain[0]) and np.isfinite(gain[1])


def test_random_directions_have_the_lengths_of_the_perturbation_and_no_preference():
    delta = jnp.asarray(np.random.default_rng(0).normal(size=(4000, 2, 2)), jnp.float32)
    random = np.asarray(random_directions(KEY, delta))
    np.testing.assert_allclose(
        np.linalg.norm(random.reshape(4000, -1), axis=1),
        np.linalg.norm(np.asarray(delta).reshape(4000, -1), axis=1),
        rtol=1e-5,
    )
    unit = random.reshape(4000, 4) / np.linalg.norm(random.reshape(4000, 4), axis=1)[:, None]
    np.testing.assert_allclose(unit.mean(0), 0, atol=0.04)
    np.testing.assert_allclose((unit**2).mean(0), 0.25, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "w9"}, r"unknown layer 'w9'; the injection points are: input, w1, w2, logits"),
        ({"target": "w9"}, r"unknown layer 'w9'; the injection points are: input, w1, w2, logits"),
        ({"layer": "w2", "target": "w1"}, r"target must be a layer above 'w2', got 'w1'"),
        ({"tolerance": 0.0}, r"tolerance must be finite and > 0, got 0\.0"),
        ({"iterations": 0}, "iterations must be a whole number >= 1, got 0"),
        ({"inputs": np.ones((0, 5), np.float32)}, r"inputs must hold at least one example"),
        ({"inputs": np.full((2, 5), np.nan, np.float32)}, r"activation at 'input' is not finite"),
        ({"inputs": np.ones((2, 5), np.int32)}, r"only a floating activation has a Jacobian"),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_bound_are_refused(linear, changes, message):
    network, variables, _ = linear
    good = {"inputs": np.ones((2, 5), np.float32), "layer": "input", "target": "w1"}
    with pytest.raises(ValueError, match=message):
        local_bound(network, variables, **(good | changes), rng=KEY)


def test_gains_of_no_example_are_refused(linear):
    network, variables, _ = linear
    none = np.ones((0, 5), np.float32)
    with pytest.raises(ValueError, match="inputs must hold at least one example, got none"):
        gains(network, variables, none, "input", none)


def test_a_jacobian_that_is_not_finite_is_refused(linear):
    network, variables, _ = linear
    broken = jax.tree.map(lambda w: w * np.nan, variables)
    with pytest.raises(ValueError, match="Jacobian from 'input' to 'w1' is not finite"):
        local_bound(network, broken, np.ones((2, 5), np.float32), "input", "w1", rng=KEY)


def test_gains_that_are_not_finite_are_refused_where_that_can_be_seen(linear):
    network, variables, _ = linear
    broken = jax.tree.map(lambda w: w * np.nan, variables)
    ones = np.ones((2, 5), np.float32)
    for weights, inputs, delta, message in (
        (broken, ones, ones, "the activation at 'w1' is not finite"),
        (variables, ones * -np.inf, ones, "the activation at 'input' is not finite"),
        (variables, ones, ones * np.nan, "delta is not finite"),
        (
            variables,
            ones,
            ones * np.float32(3e38),
            "the perturbed activation at '.*' is not finite",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            gains(network, weights, inputs, "input", delta)
    compiled = jax.jit(lambda variables: gains(network, variables, ones, "input", ones))(broken)
    assert np.isnan(compiled["w1"]).all()


def test_a_delta_of_another_shape_is_refused(linear):
    network, variables, _ = linear
    with pytest.raises(ValueError, match=r"delta must have the shape \(2, 5\).*got \(2, 7\)"):
        gains(network, variables, np.ones((2, 5), np.float32), "input", np.ones((2, 7)))
