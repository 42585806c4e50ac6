"""The convolution with a weight gradient by parts: equal to JAX's, split on CPUs alone."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from lpa_jax.models import convolution, layers

NHWC = ("NHWC", "HWIO", "NHWC")
# With `small_parts`, two parts of four examples in float32, four of two in float64.
IMAGES, KERNEL = (8, 6, 6, 3), (3, 3, 3, 2)

pytestmark = pytest.mark.usefixtures("small_parts")


@pytest.fixture
def small_parts(monkeypatch):
    """Splits small images, which compile and run fast."""
    monkeypatch.setattr(convolution, "PART_BYTES", 4 * 6 * 6 * 3 * 4)


def loss_of(convolve, strides=(1, 1), padding="SAME", **options):
    """A loss with derivatives of any order in images and kernel."""

    def loss(images, kernel):
        out = convolve(images, kernel, strides, padding, dimension_numbers=NHWC, **options)
        return jnp.mean(jnp.sin(out) ** 3)

    return loss


def draws(images=IMAGES, kernel=KERNEL, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=images), rng.normal(size=kernel) / np.sqrt(np.prod(kernel[:-1]))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def parts_in(function, *arguments):
    """Examples contracted by each weight gradient of the compiled program."""
    text = jax.jit(function).lower(*arguments).as_text()
    gradients = re.findall(r"dim_numbers = \[f, 0, 1, b\].*: \(tensor<(\d+)x", text)
    return [int(examples) for examples in gradients]


def agree(ours, plain, rtol):
    for mine, reference in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        mine, reference = (np.asarray(x, np.float64) for x in (mine, reference))
        np.testing.assert_allclose(mine, reference, rtol=0, atol=rtol * np.abs(reference).max())


@pytest.mark.parametrize(
    ("images", "kernel", "options", "parts"),
    [
        (IMAGES, KERNEL, {}, [4] * 2),
        ((8, 7, 5, 3), KERNEL, {"strides": (2, 2), "padding": ((1, 1), (0, 1))}, [4] * 2),
        ((9, 8, 8, 3), (5, 4, 3, 2), {"strides": (2, 1), "padding": "VALID"}, [1] * 9),
        (IMAGES, (1, 1, 3, 2), {"padding": ((1, 0), (0, 0))}, [4] * 2),
        ((31, 7, 6, 3), (1, 1, 3, 2), {"precision": "highest", "strides": (2, 2)}, []),
    ],
)
def test_gradients_in_float32_are_those_of_jax(images, kernel, options, parts):
    x, w = draws(images, kernel)
    ours, plain = (
        loss_of(convolve, **options)
        for convolve in (convolution.conv_general_dilated, lax.conv_general_dilated)
    )
    assert parts_in(jax.grad(ours, (0, 1)), x, w) == parts
    values = [jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w) for loss in (ours, plain)]
    agree(*values, rtol=2e-6)


def test_bfloat16_keeps_its_type_and_the_gradients_of_jax_to_its_precision():
    x, w = draws((16, *IMAGES[1:]), dtype=jnp.bfloat16)
    ours = jax.jit(jax.grad(loss_of(convolution.conv_general_dilated), (0, 1)))(x, w)
    assert {gradient.dtype for gradient in ours} == {jnp.dtype("bfloat16")}
    agree(ours, jax.jit(jax.grad(loss_of(lax.conv_general_dilated), (0, 1)))(x, w), rtol=2e-2)


def _hessian_vector_product(loss, x, w, v):
    return jax.jvp(jax.grad(loss, (0, 1)), (x, w), v)


def _gradient_of_gradient(loss, x, w, v):
    def along(x, w):
        return sum(map(jnp.vdot, jax.grad(loss, (0, 1))(x, w), v))

    return jax.grad(along, (0, 1))(x, w)


def _gradient_of_tangent(loss, x, w, v):
    return jax.grad(lambda x, w: jax.jvp(loss, (x, w), v)[1], (0, 1))(x, w)


def _several_kernels(loss, x, w, v):
    return jax.vmap(jax.grad(loss, (0, 1)), (None, 0))(x, jnp.stack([w, v[1]]))


def _several_batches(loss, x, w, v):
    return jax.vmap(jax.grad(loss, (0, 1)), (0, None))(jnp.stack([x, v[0]]), w)


def _scan(loss, x, w, v):
    del v
    return lax.scan(lambda w, _: (w - 0.1 * jax.grad(loss, 1)(x, w), None), w, length=2)[0]


@pytest.mark.parametrize(
    "transform",
    [
        lambda loss, x, w, v: jax.jvp(loss, (x, w), v),
        lambda loss, x, w, v: jax.linearize(loss, x, w)[1](*v),
        lambda loss, x, w, v: jax.grad(jax.checkpoint(loss), (0, 1))(x, w),
        _hessian_vector_product,
        _gradient_of_gradient,
        _gradient_of_tangent,
        _several_kernels,
        _several_batches,
        _scan,
    ],
    ids=["jvp", "linearize", "remat", "hvp", "grad_grad", "grad_jvp", "vmap_w", "vmap_x", "scan"],
)
def test_every_transformation_in_float64_is_that_of_jax(transform, x64):
    x, w = draws(dtype=jnp.float64)
    v = tuple(jnp.asarray(np.random.default_rng(1).normal(size=a.shape)) for a in (x, w))
    assert parts_in(jax.grad(loss_of(convolution.conv_general_dilated), 1), x, w) == [2] * 4
    ours, plain = (
        jax.jit(functools.partial(transform, loss_of(convolve)))(x, w, v)
        for convolve in (convolution.conv_general_dilated, lax.conv_general_dilated)
    )
    agree(ours, plain, rtol=1e-12)


@pytest.mark.parametrize(
    ("images", "kernel", "options"),
    [
        ((4, 6, 6, 3), KERNEL, {}),
        ((37, 6, 6, 3), KERNEL, {}),
        (IMAGES, (3, 3, 1, 3), {"feature_group_count": 3}),
        (IMAGES, KERNEL, {"rhs_dilation": (2, 2)}),
        (IMAGES, KERNEL, {"lhs_dilation": (2, 2)}),
        (IMAGES, KERNEL, {"batch_group_count": 2}),
    ],
    ids=["small", "prime_batch", "depthwise", "dilated", "transposed", "batch_groups"],
)
def test_what_the_split_does_not_help_is_left_to_jax(images, kernel, options):
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (images, kernel))
    padding = ((1, 1), (1, 1))
    ours, plain = (
        str(jax.make_jaxpr(jax.grad(loss_of(convolve, padding=padding, **options), (0, 1)))(x, w))
        for convolve in (convolution.conv_general_dilated, lax.conv_general_dilated)
    )
    assert ours == plain


def test_the_gradient_of_the_activation_alone_forms_no_weight_gradient():
    x, w = draws()
    loss = loss_of(convolution.conv_general_dilated)
    text = jax.jit(jax.grad(loss)).lower(x, w).as_text()
    assert text.count("stablehlo.convolution") == 2 and not parts_in(jax.grad(loss), x, w)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("kernel", [KERNEL, (1, 1, 3, 2)])
def test_programs_for_other_platforms_have_one_weight_gradient_and_no_parts(platform, kernel):
    x, w = draws(kernel=kernel)
    traced = jax.jit(jax.grad(loss_of(convolution.conv_general_dilated), (0, 1))).trace(x, w)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == 3
    # What remains of the other branch: zeros that nothing reads.
    assert not re.search("stablehlo.(slice|concatenate|dot_general)", text)


def test_linen_and_nnx_layers_take_it():
    x, w = draws()
    linen = nn.Conv(2, (3, 3), conv_general_dilated=convolution.conv_general_dilated)
    variables = {"params": {"kernel": w, "bias": jnp.zeros(2)}}
    ours = linen.apply(variables, x)
    agree(ours, nn.Conv(2, (3, 3)).apply(variables, x), rtol=0)
    gradient = jax.grad(lambda v: jnp.sum(linen.apply(v, x) ** 2))
    assert parts_in(gradient, variables) == [4, 4]
    layer = nnx.Conv(
        3, 2, (3, 3), rngs=nnx.Rngs(0), conv_general_dilated=convolution.conv_general_dilated
    )
    layer.kernel[...] = w
    agree(layer(x), ours, rtol=0)


def test_what_precedes_the_models_relu_is_computed_once_for_all_parts():
    x, w = draws(kernel=(3, 3, 3, 3))
    convolve = functools.partial(convolution.conv_general_dilated, dimension_numbers=NHWC)

    def loss(w, x, fixed):
        hidden = layers.relu(convolve(x, fixed, (1, 1), "SAME") - x)
        return jnp.sum(convolve(hidden, w, (1, 1), "SAME") ** 3)

    text = jax.jit(jax.grad(loss)).lower(w, x, w).compile().as_text()
    assert len(re.findall(r"= f32\[8,6,6,3\]\S* subtract\(", text)) == 1


@pytest.mark.parametrize("transform", [lambda f: f, jax.grad, lambda f: jax.grad(jax.grad(f))])
def test_the_models_relu_and_its_derivatives_are_those_of_flax(transform):
    x = jnp.array([-jnp.inf, -2.0, -0.0, 0.0, 1e-30, 3.0, jnp.inf])
    ours, plain = (jax.vmap(transform(lambda x, f=f: f(x) ** 2))(x) for f in (layers.relu, nn.relu))
    np.testing.assert_array_equal(ours, plain)
