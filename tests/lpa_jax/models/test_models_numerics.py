"""Normalisation, running statistics and precision of the staged models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from lpa_jax import models
from tests.helpers.tiny_models import (
    EVERY_FAMILY,
    TINY,
    abstract_variables,
    normal,
    random_variables,
)


def test_a_segment_updates_only_its_own_statistics():
    model = TINY["resnet8"]
    variables = random_variables(model)
    h = normal(4, 8, 8, 4)
    segment = jax.jit(
        functools.partial(
            model.apply, train=True, start="stage1", stop="stage2", mutable=["batch_stats"]
        )
    )
    before, after = variables["batch_stats"], segment(variables, h)[1]["batch_stats"]
    assert after.keys() == before.keys()
    for stage in after:
        equal = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), before[stage], after[stage])
        assert set(jax.tree.leaves(equal)) == {stage != "stage2"}, stage


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32(name):
    model = TINY[name].clone(dtype="bfloat16")
    variables = abstract_variables(model, 8)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)

    def run(stop):
        return jax.eval_shape(lambda v, x: model.apply(v, x, stop=stop), variables, image).dtype

    assert run("logits") == jnp.float32
    assert {run(layer) for layer in model.layers[1:-1]} == {jnp.dtype("bfloat16")}


def test_bfloat16_logits_are_near_the_float32_ones(images):
    model = TINY["small_cnn"]
    variables = random_variables(model)
    exact = jax.jit(model.apply)(variables, images)
    half = jax.jit(model.clone(dtype="bfloat16").apply)(variables, images)
    assert_allclose(half, exact, atol=0.05 * float(jnp.max(jnp.abs(exact))))
    assert not np.array_equal(half, exact)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_without_batch_norm_there_are_no_statistics_and_examples_are_independent(norm, images):
    model = models.SmallCNN(3, widths=(6, 10), norm=norm, groups=4)
    variables = random_variables(model)
    assert set(variables) == {"params"}
    run = jax.jit(functools.partial(model.apply, train=True))
    before, after = run(variables, images), run(variables, images.at[0].multiply(-2))
    assert_array_equal(before[1:], after[1:])
    assert not np.allclose(before[0], after[0])


def test_group_norm_normalises_over_gcd_groups(images):
    model = models.SmallCNN(3, widths=(6,), groups=4)
    variables = random_variables(model)
    conv, norm = (variables["params"]["stage1"][part] for part in ("conv", "norm"))
    y = np.asarray(
        jax.lax.conv_general_dilated(
            images,
            conv["kernel"],
            (2, 2),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    )
    groups = y.reshape(4, 4, 4, 2, 3)  # gcd(4, 6) = 2 groups of 3 features
    mean = groups.mean(axis=(1, 2, 4), keepdims=True)
    var = groups.var(axis=(1, 2, 4), keepdims=True)
    normalised = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(y.shape)
    expected = np.maximum(normalised * np.asarray(norm["scale"]) + np.asarray(norm["bias"]), 0)
    out = jax.jit(functools.partial(model.apply, stop="stage1"))(variables, images)
    assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_synchronised_batch_norm_uses_the_global_batch(images):
    # The two halves of the batch on two members of a mapped axis, against the whole batch.
    local = models.SmallCNN(3, widths=(4,), norm="batch")
    synchronised = local.clone(axis_name="devices")
    variables = random_variables(local)

    @functools.partial(jax.jit, static_argnums=0)
    def train(model, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    @functools.partial(jax.jit, static_argnums=0)
    def train_halves(model):
        halves = jnp.reshape(images, (2, 2, 8, 8, 3))
        logits, update = jax.vmap(functools.partial(train, model), axis_name="devices")(halves)
        return jnp.reshape(logits, (4, 3)), update

    logits, update = train(local, images)
    logits_halves, update_halves = train_halves(synchronised)
    assert_allclose(logits_halves, logits, rtol=1e-4, atol=1e-5)
    for leaf, leaf_halves in zip(
        jax.tree.leaves(update), jax.tree.leaves(update_halves), strict=True
    ):
        assert_allclose(leaf_halves, np.stack([leaf, leaf]), rtol=1e-5, atol=1e-6)
    assert not np.allclose(train_halves(local)[0], logits, atol=1e-3)


def test_synchronised_batch_norm_trains_under_pmap_and_evaluates_outside(images):
    local = models.SmallCNN(3, widths=(4,), norm="batch")
    synchronised = local.clone(axis_name="devices")
    variables = random_variables(local)
    train = jax.pmap(
        lambda v, x: synchronised.apply(v, x, train=True, mutable=["batch_stats"]),
        axis_name="devices",
        in_axes=(None, 0),
        out_axes=(0, None),
        devices=jax.devices()[:1],
    )
    logits, update = train(variables, images[None])
    apply = functools.partial(local.apply, train=True, mutable=["batch_stats"])
    expected, _ = jax.jit(apply)(variables, images)
    assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-5)
    trained = {**variables, **update}
    evaluated = jax.jit(synchronised.apply)(trained, images)
    assert_array_equal(evaluated, jax.jit(local.apply)(trained, images))


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_normalized_head_gives_the_cosines_between_features_and_class_weights(name, images):
    model = TINY[name].clone(head="normalized")
    variables = random_variables(model)
    assert set(variables["params"]["logits"]) == {"kernel"}
    last = model.layers[-2]

    @jax.jit
    def run(variables, images):
        h = model.apply(variables, images, stop=last)
        return h, model.apply(variables, h, start=last), model.apply(variables, images)

    h, logits, whole = run(variables, images)
    h, w = (np.asarray(v, np.float64) for v in (h, variables["params"]["logits"]["kernel"]))
    lengths = np.linalg.norm(h, axis=1)[:, None] * np.linalg.norm(w, axis=0)[None]
    assert_allclose(logits, h @ w / lengths, rtol=1e-4, atol=1e-6)
    assert_allclose(whole, logits, rtol=1e-4, atol=1e-6)


def test_normalized_head_is_finite_for_zero_small_and_large_activations():
    model = TINY["mlp"].clone(head="normalized")
    variables = random_variables(model)
    h = jnp.asarray(np.array([0.0, 1e-30, 1.0, 1e30])[:, None] * np.ones((1, 5)), jnp.float32)

    def total(h, variables):
        logits = model.apply(variables, h, start="hidden2")
        return jnp.sum(logits[:, 0]), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(h, variables)
    assert_array_equal(logits[0], np.zeros(3))
    assert_allclose(logits[1:], np.broadcast_to(logits[2], (3, 3)), rtol=1e-5)
    assert_array_equal(gradient[0], np.zeros(5))
    assert np.all(np.isfinite(gradient))
    # A cosine does not change along its own direction.
    assert_allclose(gradient[2] @ h[2], 0.0, atol=1e-5)


def test_normalized_head_keeps_cosines_of_bfloat16_activations_in_float32():
    model = TINY["small_cnn"].clone(head="normalized", dtype="bfloat16")
    image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    variables = abstract_variables(model, 8)
    assert jax.eval_shape(model.apply, variables, image).dtype == jnp.float32
    assert variables["params"]["logits"]["kernel"].dtype == jnp.float32
