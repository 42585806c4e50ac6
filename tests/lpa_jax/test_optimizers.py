"""Optimizers against the recurrences written out in NumPy, and schedules against their values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lpa_jax import optimizers

PARAMS = {
    "conv": jnp.full((1, 1, 2, 2), 2.0),
    "kernel": jnp.full((2, 1), 2.0),
    "bias": jnp.full((2,), 2.0),
    "scale": jnp.array(2.0),
}
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)


def one_update(optimizer, gradient, params):
    return optimizer.update(gradient, optimizer.init(params), params)[0]


def trajectory(optimizer, start, gradients):
    """Parameters after each step."""
    params, state, path = jnp.asarray(start), optimizer.init(jnp.asarray(start)), []
    for gradient in gradients:
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params))
    return path


def gradients_and_start():
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, 2, 3)).astype(np.float32), np.ones((2, 3), np.float32)


def clipped(gradient, bound):
    return gradient * min(1.0, bound / np.linalg.norm(gradient))


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_equals_its_recurrence(nesterov):
    gradients, start = gradients_and_start()
    optimizer = optimizers.sgd(0.1, 0.9, nesterov, weight_decay=0.05, clip_norm=1.0)
    w, v, expected = start.astype(np.float64), np.zeros((2, 3)), []
    for gradient in gradients.astype(np.float64):
        decayed = clipped(gradient, 1.0) + 0.05 * w
        v = 0.9 * v + decayed
        w = w - 0.1 * (decayed + 0.9 * v if nesterov else v)
        expected.append(w)
    np.testing.assert_allclose(trajectory(optimizer, start, gradients), expected, rtol=1e-5)


def test_adamw_equals_its_recurrence():
    gradients, start = gradients_and_start()
    optimizer = optimizers.adamw(0.1, 0.8, 0.9, 1e-3, weight_decay=0.05, clip_norm=1.0)
    w, m, v, expected = start.astype(np.float64), 0.0, 0.0, []
    for t, gradient in enumerate(gradients.astype(np.float64), start=1):
        gradient = clipped(gradient, 1.0)
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        adam = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
        w = w - 0.1 * (adam + 0.05 * w)
        expected.append(w)
    np.testing.assert_allclose(trajectory(optimizer, start, gradients), expected, rtol=1e-5)


@pytest.mark.parametrize("name", optimizers.names())
def test_biases_and_norms_are_decayed_only_on_request(name):
    def decay(**options):
        updates = one_update(
            optimizers.create(name, 1.0, weight_decay=0.25, **options), ZERO, PARAMS
        )
        return {key: float(np.ravel(update)[0]) for key, update in updates.items()}

    # Nesterov's look-ahead applies the first gradient 1 + 0.9 times.
    full = -0.5 * (1.9 if name == "sgd" else 1.0)
    by_default = decay()
    assert by_default == pytest.approx({"conv": full, "kernel": full, "bias": 0.0, "scale": 0.0})
    assert decay(decay_biases_and_norms=True) == pytest.approx(dict.fromkeys(PARAMS, full))


@pytest.mark.parametrize("name", optimizers.names())
def test_nothing_is_decayed_by_default(name):
    for update in jax.tree.leaves(one_update(optimizers.create(name, 1.0), ZERO, PARAMS)):
        np.testing.assert_array_equal(update, 0.0)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_clipping_bounds_the_global_norm_and_spares_smaller_gradients(size):
    # The norm is taken over all parameters together: 9 entries of size / 3 have the norm size.
    gradient = jax.tree.map(lambda x: jnp.full_like(x, size / 3.0), PARAMS)
    update = one_update(optimizers.sgd(1.0, momentum=0.0, clip_norm=0.5), gradient, PARAMS)
    assert float(optax.tree.norm(gradient)) == pytest.approx(size)
    assert float(optax.tree.norm(update)) == pytest.approx(min(size, 0.5), rel=1e-5)


def test_the_decay_is_added_after_clipping():
    params = jnp.full((1, 1), 2.0)
    optimizer = optimizers.sgd(1.0, momentum=0.0, weight_decay=0.25, clip_norm=1.0)
    update = one_update(optimizer, jnp.full((1, 1), 10.0), params)
    assert float(update[0, 0]) == pytest.approx(-(1.0 + 0.25 * 2.0))


def test_optimizer_follows_its_schedule():
    rate = optimizers.schedule("step", 1.0, total_steps=4, milestones=(0.5,), factor=0.1)
    optimizer = optimizers.sgd(rate, momentum=0.0)
    path = trajectory(optimizer, np.zeros((1, 1), np.float32), np.ones((4, 1, 1), np.float32))
    np.testing.assert_allclose(np.ravel(path), [-1.0, -2.0, -2.1, -2.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "values"),
    [
        ("constant", {}, {0: 0.4, 50: 0.4, 100: 0.4}),
        ("cosine", {}, {0: 0.4, 50: 0.2, 100: 0.0, 130: 0.0}),
        ("cosine", {"warmup_steps": 3}, {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4, 100: 0.0}),
        ("cosine", {"warmup_steps": 20}, {20: 0.4, 60: 0.2, 100: 0.0}),
        ("constant", {"warmup_steps": 3}, {0: 0.1, 3: 0.4, 100: 0.4}),
        ("step", {"milestones": (0.3, 0.6, 0.8)},
         {0: 0.4, 29: 0.4, 30: 0.08, 59: 0.08, 60: 0.016, 80: 0.0032, 100: 0.0032}),
        ("step", {"milestones": (0.57,), "factor": 0.5}, {56: 0.4, 57: 0.2}),
        ("step", {"milestones": (0.02,), "warmup_steps": 3}, {0: 0.1, 1: 0.2, 2: 0.06, 3: 0.08}),
    ],
)  # fmt: skip
def test_schedule_has_the_values_worked_out_by_hand(name, options, values):
    rate = optimizers.schedule(name, 0.4, total_steps=100, **options)
    traced = jax.jit(rate)
    for step, value in values.items():
        assert float(rate(step)) == pytest.approx(value, rel=1e-5, abs=1e-8), step
        assert float(traced(jnp.int32(step))) == pytest.approx(value, rel=1e-5, abs=1e-8), step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "linear"}, "name must be one of constant, cosine, step, got 'linear'"),
        ({"base_rate": -0.1}, "base_rate must be .*got -0.1"),
        ({"total_steps": 0}, "total_steps must be a whole number >= 1, got 0"),
        ({"warmup_steps": 100}, "warmup_steps must be >= 0 and below total_steps=100, got 100"),
        ({"name": "step"}, r"milestones must be one or more fractions.*got \(\)"),
        ({"name": "step", "milestones": (60, 120)}, r"milestones must be .*got \(60, 120\)"),
        ({"name": "step", "milestones": (0.5,), "factor": 0.0}, "factor must be .*got 0.0"),
    ],
)
def test_bad_schedule_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        optimizers.schedule(**({"name": "cosine", "base_rate": 0.1, "total_steps": 100} | options))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lars", {}, "optimizer must be one of sgd, adamw, got 'lars'"),
        ("adamw", {"momentum": 0.9},
         "option of optimizer 'adamw' must be one of b1, .*got 'momentum'"),
        ("sgd", {"learning_rate": math.nan}, "learning_rate must be .*got nan"),
        ("sgd", {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1\.0"),
        ("sgd", {"weight_decay": -1e-4}, "weight_decay must be .*got -0.0001"),
        ("adamw", {"clip_norm": 0.0}, "clip_norm must be .*got 0.0"),
        ("adamw", {"b1": 1.0}, r"b1 must be in \[0, 1\)"),
        ("adamw", {"b2": -0.1}, r"b2 must be in \[0, 1\)"),
        ("adamw", {"eps": 0.0}, r"eps must be finite and > 0, got 0\.0"),
    ],
)  # fmt: skip
def test_bad_optimizer_is_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=message):
        optimizers.create(name, **({"learning_rate": 0.1} | options))
