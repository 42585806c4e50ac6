"""One contract for all: every registered perturbation passes the same checks.

A new method needs an entry in METHODS: arguments to test it with, and arguments of zero strength.
"""

import dataclasses
import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lpa_jax
from lpa_jax import losses, perturbations
from lpa_jax.perturbations import Applied, Feedback, Site

BATCH, POSITIONS, CHANNELS, CLASSES = 6, (4, 3), 2, 5
MAP, LOGITS = (*POSITIONS, CHANNELS), (CLASSES,)


class Method(NamedTuple):
    """What the suite must know about a registered method.

    Attributes:
      variants: arguments by label; every variant passes the suite.
      zero: arguments under which the method is the identity, bitwise.
      random: whether the result depends on the key.
      shape: S of the activation [B, *S] that it is tested on.
    """

    variants: dict
    zero: list
    random: bool
    shape: tuple = MAP


METHODS = {
    "adversarial": Method(
        {"l2": {"radius": 0.1, "steps": 2}, "linf": {"radius": 0.1, "norm": "linf"}},
        [{"radius": 0.0}, {"steps": 0}],
        random=False,
    ),
    "dropout": Method({"": {"rate": 0.3}}, [{"rate": 0.0}], random=True),
    "gaussian_noise": Method({"": {"sigma": 0.2}}, [{"sigma": 0.0}], random=True),
    "lpa": Method(
        {
            "cold": {"radius": 0.1, "steps": 2},
            "carry": {"radius": 0.1, "mode": "carry", "shape": "channel"},
            "free": {"radius": 0.1, "mode": "free"},
        },
        [{"radius": 0.0}, {"steps": 0}],
        random=False,
    ),
    "lpl": Method({"": {"radius": 1.0}}, [{"radius": 0.0}, {"steps": 0}], False, LOGITS),
    "manifold_mixup": Method({"": {"alpha": 1.0}}, [{"alpha": 0.0}], random=True),
    "mixstyle": Method({"": {"alpha": 0.5, "probability": 1.0}},
                       [{"alpha": 0.0}, {"probability": 0.0}], random=True),
    "rsc": Method({"": {}}, [{"drop_f": 0.0}, {"drop_b": 0.0}], random=False),
    "spatial_dropout": Method({"channels": {"rate": 0.5}, "blocks": {"rate": 0.5, "block_size": 2}},
                              [{"rate": 0.0}], random=True),
}  # fmt: skip
VARIANTS = [
    pytest.param(name, label, id=f"{name}-{label}".strip("-"))
    for name, method in METHODS.items()
    for label in method.variants
]
every_variant = pytest.mark.parametrize(("name", "label"), VARIANTS)
# What compiles anew or runs op by op takes long: without -m slow, one variant of a method.
first_variants = pytest.mark.parametrize(
    ("name", "label"),
    [
        pytest.param(*v.values, id=v.id, marks=() if v.values[1] == first else pytest.mark.slow)
        for v in VARIANTS
        for first in [next(iter(METHODS[v.values[0]].variants))]
    ],
)


class Pass(NamedTuple):
    """What one training pass through a perturbation yields."""

    applied: Applied
    feedback: Feedback
    gradient: jax.Array
    state: object


@functools.cache
def decoder(shape):
    """The network above the injection point: a fixed tanh MLP, or nothing at the logits."""
    if shape == LOGITS:
        return lambda h: h
    generator = np.random.default_rng(0)
    # Arrays of NumPy: the first call may be traced.
    hidden = np.float32(generator.normal(size=(int(np.prod(shape)), 8)) / 3)
    output = np.float32(generator.normal(size=(8, CLASSES)))
    bias = np.linspace(-0.5, 0.5, 8, dtype=np.float32)[np.newaxis]
    return lambda h: jnp.tanh(h.reshape(h.shape[0], -1) @ hidden + bias) @ output


def site_of(shape, activation, targets, labels, rng):
    return Site(activation, targets, labels, decoder(shape), losses.cross_entropy, rng)


def after_update(perturbation, state, site, feedback):
    if perturbation.update is None:
        return state
    return perturbation.update(state, dataclasses.replace(site, decode=None), feedback)


def training_pass(perturbation, shape, state, activation, *rest):
    """Perturbs, scores, differentiates with respect to the activation, and updates the state."""
    decode = decoder(shape)

    def loss_fn(h):
        applied = perturbation.apply(state, site_of(shape, h, *rest))
        loss, pull_back = jax.vjp(
            lambda h: losses.cross_entropy(decode(h), applied.targets), applied.activation
        )
        feedback = Feedback(*pull_back(jnp.ones_like(loss)), decode(applied.activation))
        return jnp.mean(loss), (applied, jax.lax.stop_gradient(feedback))

    gradient, (applied, feedback) = jax.grad(loss_fn, has_aux=True)(activation)
    site = site_of(shape, activation, *rest)
    return Pass(
        applied, feedback, gradient, after_update(perturbation, applied.state, site, feedback)
    )


class Problem(NamedTuple):
    """A perturbation with its first state, and its training pass under jit."""

    perturbation: perturbations.Perturbation
    state: object
    jitted: object


@functools.cache
def problem(name, label):
    method = METHODS[name]
    perturbation = perturbations.create(name, **method.variants[label])
    state = perturbation.init(jax.ShapeDtypeStruct((BATCH, *method.shape), jnp.float32), CLASSES)
    jitted = jax.jit(functools.partial(training_pass, perturbation, method.shape))
    return Problem(perturbation, state, jitted)


def batch(shape, dtype=jnp.float32, size=BATCH, fill=None):
    """Activation, targets and labels; classes 3 and 4 are absent."""
    values = np.random.default_rng(1).normal(size=(size, *shape))
    values = values if fill is None else np.full_like(values, fill)
    labels = jnp.arange(size, dtype=jnp.int32) % 3
    return jnp.asarray(values, dtype), jax.nn.one_hot(labels, CLASSES), labels


def run(name, label, dtype=jnp.float32, key=0, **kwargs):
    _, state, jitted = problem(name, label)
    return jitted(state, *batch(METHODS[name].shape, dtype, **kwargs), rng_key(key))


def rng_key(seed):
    # The default generator takes half a second a method to compile on a CPU, this one a tenth.
    return jax.random.key(seed, impl="rbg")


def structure(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def assert_finite(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        values = np.asarray(leaf.astype(jnp.float32))
        assert np.all(np.isfinite(values)), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", perturbations.names())
def test_every_registered_method_has_an_entry_in_this_suite(name):
    assert name in METHODS, (
        f"perturbation {name!r} is registered but has no entry in METHODS of {__file__}: "
        "add the arguments that the contract suite shall test it with"
    )


def test_every_entry_of_this_suite_is_registered():
    assert not set(METHODS) - set(perturbations.names())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_created_by_its_name_alone(name):
    assert perturbations.create(name).name == name


@pytest.mark.parametrize(
    ("factory", "defaults"),
    [
        (lpa_jax.dropout, {"rate": 0.5}),
        (lpa_jax.manifold_mixup, {"alpha": 2.0}),
        (lpa_jax.mixstyle, {"alpha": 0.1, "probability": 0.5}),
        (lpa_jax.rsc, {"drop_f": 1 / 3, "drop_b": 1 / 3}),
        (lpa_jax.spatial_dropout, {"rate": 0.1, "block_size": None}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_defaults_are_the_published_ones(factory, defaults):
    parameters = inspect.signature(factory).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == defaults


@first_variants
def test_jit_equals_eager(name, label):
    perturbation, state, _ = problem(name, label)
    shape = METHODS[name].shape
    site = site_of(shape, *batch(shape), rng_key(0))
    result = run(name, label)
    applied = perturbation.apply(state, site)
    updated = after_update(perturbation, applied.state, site, result.feedback)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(compare, (applied, updated), (result.applied, result.state))


@every_variant
def test_dtype_is_kept_and_gradients_are_finite(name, label):
    assert_kept_and_finite(name, label, jnp.float32, BATCH)


@first_variants
def test_a_bfloat16_batch_of_one_example_keeps_its_dtype_and_finite_gradients(name, label):
    assert_kept_and_finite(name, label, jnp.bfloat16, 1)


def assert_kept_and_finite(name, label, dtype, size):
    result = run(name, label, dtype, size=size)
    assert result.applied.activation.dtype == result.gradient.dtype == dtype
    assert result.applied.targets.dtype == jnp.float32
    assert result.applied.activation.shape == result.gradient.shape == (size, *METHODS[name].shape)
    assert np.any(np.asarray(result.gradient, np.float32) != 0)
    assert_finite(result)


@every_variant
def test_second_step_neither_recompiles_nor_changes_the_state_structure(name, label):
    _, state, jitted = problem(name, label)
    inputs = batch(METHODS[name].shape)
    first = jitted(state, *inputs, rng_key(0))
    compiled = jitted._cache_size()
    second = jitted(first.state, *inputs, rng_key(1))
    assert jitted._cache_size() == compiled
    for after in (first.applied.state, first.state, second.state):
        assert structure(after) == structure(state)


@every_variant
def test_key_alone_decides_what_is_random(name, label):
    first, again, other = (
        np.asarray(run(name, label, key=key).applied.activation) for key in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first, other) != METHODS[name].random


@every_variant
def test_perturbation_changes_the_activation_once_its_state_is_warm(name, label):
    _, state, jitted = problem(name, label)
    activation, targets, labels = batch(METHODS[name].shape)
    for key in range(3):
        result = jitted(state, activation, targets, labels, rng_key(key))
        state = result.state
    assert not np.array_equal(result.applied.activation, activation)


@functools.cache
def unperturbed(shape):
    return training_pass(perturbations.identity(), shape, (), *batch(shape), rng_key(0))


@pytest.mark.parametrize(
    ("name", "zero"),
    [
        pytest.param(name, zero, id=f"{name}-{next(iter(zero))}")
        for name, method in METHODS.items()
        for zero in method.zero
    ],
)
def test_zero_strength_is_bitwise_no_perturbation(name, zero):
    shape = METHODS[name].shape
    perturbation = perturbations.create(name, **zero)
    state = perturbation.init(jax.ShapeDtypeStruct((BATCH, *shape), jnp.float32), CLASSES)
    inputs = (*batch(shape), rng_key(0))
    result = training_pass(perturbation, shape, state, *inputs)
    assert perturbation.name == name
    np.testing.assert_array_equal(result.applied.activation, inputs[0])
    np.testing.assert_array_equal(result.applied.targets, inputs[1])
    np.testing.assert_array_equal(result.gradient, unperturbed(shape).gradient)


@every_variant
@pytest.mark.parametrize("fill", [0.0, 0.5])
def test_constant_activation_gives_finite_results(name, label, fill):
    assert_finite(run(name, label, fill=fill))


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^perturbation must be .*lpa.*mean 'dropout'\?\)$"):
        perturbations.create("dropuot")


@pytest.mark.parametrize("name", METHODS)
def test_unknown_option_is_refused_with_the_known_ones(name):
    known = ", ".join(perturbations.options(name))
    with pytest.raises(ValueError, match=rf"'{name}' must be one of {known}, got 'xyz'$"):
        perturbations.create(name, xyz=0.5)
