"""A convolution whose weight gradient is fast on CPUs."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

# A part's images and its output gradients each take at most this much memory, so that both fit in a
# core's cache. Measured on both sides; see docs/costs.md.
PART_BYTES = 2**20
# More parts cost more to compile than they save.
MOST_PARTS = 16

_CHANNELS_LAST = lax.conv_dimension_numbers((1,) * 4, (1,) * 4, ("NHWC", "HWIO", "NHWC"))


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` with a weight gradient that is fast on CPUs.

    On a CPU the gradient with respect to `rhs` is the sum of the gradients of equal parts of the
    batch,

        dL/drhs = sum_p  lhs_p * dL/dout_p,

    so small that a part fits in a core's cache (`number_of_parts`); that of a 1x1 kernel is one
    matrix product. They equal those of the plain form up to rounding. At batch 128, the ones of
    ResNet-20 take a third to a half of the time.
    Values, the gradient with respect to `lhs` and programs for other platforms are those of
    `jax.lax.conv_general_dilated`. So is everything for small images and batches, for groups and
    dilations, for `out_sharding`, and for images other than `[B, H, W, F]`.

    `jvp`, `vjp`, `vmap`, `jax.checkpoint`, sharded batches and derivatives of any order work as
    for the plain form.

    Args:
      lhs: Images, `[B, H, W, F_in]` with the `dimension_numbers` that Flax gives.
      rhs: Kernel, `[h, w, F_in, F_out]`.
      window_strides: As in `jax.lax.conv_general_dilated`; likewise all that follow.
      padding: See there.
      lhs_dilation: See there.
      rhs_dilation: See there.
      dimension_numbers: See there.
      feature_group_count: See there.
      batch_group_count: See there.
      precision: See there.
      preferred_element_type: See there.
      out_sharding: See there.

    Returns:
      The convolution, `[B, H', W', F_out]`.

    Example:
      >>> import flax.linen as nn
      >>> layer = nn.Conv(8, (3, 3), conv_general_dilated=conv_general_dilated)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((32, 8, 8, 3)))
      >>> variables["params"]["kernel"].shape
      (3, 3, 3, 8)

      Likewise `nnx.Conv(3, 8, (3, 3), conv_general_dilated=conv_general_dilated, rngs=rngs)`.
    """
    options = _Options(
        tuple(window_strides),
        padding if isinstance(padding, str) else tuple(map(tuple, padding)),
        lhs_dilation and tuple(lhs_dilation),
        rhs_dilation and tuple(rhs_dilation),
        lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers),
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
        out_sharding,
    )
    parts = _parts(lhs, rhs, options)
    return _plain(lhs, rhs, options) if parts is None else _split(lhs, rhs, options, parts)


class _Options(NamedTuple):
    """What follows the two arrays in `jax.lax.conv_general_dilated`, hashable."""

    window_strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...] | None
    rhs_dilation: tuple[int, ...] | None
    dimension_numbers: lax.ConvDimensionNumbers
    feature_group_count: int
    batch_group_count: int
    precision: Any
    preferred_element_type: Any
    out_sharding: Any


def number_of_parts(batch_size: int, example_bytes: int) -> int:
    """Parts of the batch: the fewest whose arrays fit in `PART_BYTES`, but at most `MOST_PARTS`.

    Args:
      batch_size: B; the number of parts divides it.
      example_bytes: Memory of one example's image or output, whichever is larger.

    Example:
      >>> [number_of_parts(size, 65536) for size in (16, 100, 128, 1024, 37)]
      [1, 10, 8, 16, 1]
    """
    parts = [parts for parts in range(1, MOST_PARTS + 1) if batch_size % parts == 0]
    fitting = [n for n in parts if batch_size // n * example_bytes <= PART_BYTES]
    return fitting[0] if fitting else parts[-1]


def _parts(lhs: jax.Array, rhs: jax.Array, options: _Options) -> int | None:
    """Parts by which the weight gradient is summed; None where the plain form is as good."""
    plain_ones = {
        *(options.lhs_dilation or ()),
        *(options.rhs_dilation or ()),
        options.feature_group_count,
        options.batch_group_count,
    }
    known = options.dimension_numbers == _CHANNELS_LAST and options.out_sharding is None
    if lhs.ndim != 4 or plain_ones != {1} or not known:
        return None
    out = jax.eval_shape(functools.partial(_plain, options=options), lhs, rhs)
    largest = max(math.prod(x.shape[1:]) * x.dtype.itemsize for x in (lhs, out))
    if lhs.shape[0] * largest <= PART_BYTES:
        return None
    if _is_pointwise(rhs, options):
        return 1
    parts = number_of_parts(lhs.shape[0], largest)
    return None if parts == 1 else parts


def _is_pointwise(rhs: jax.Array, options: _Options) -> bool:
    """Whether the kernel is 1x1 and sees no padding."""
    padding = options.padding
    padded = not isinstance(padding, str) and any(map(any, padding))
    return rhs.shape[:2] == (1, 1) and not padded


def _plain(lhs: jax.Array, rhs: jax.Array, options: _Options) -> jax.Array:
    return lax.conv_general_dilated(lhs, rhs, **options._asdict())


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _split(lhs: jax.Array, rhs: jax.Array, options: _Options, parts: int) -> jax.Array:
    """The plain convolution, whose tangent in `rhs` is `_kernel_tangent`."""
    return _plain(lhs, rhs, options)


@functools.partial(_split.defjvp, symbolic_zeros=True)
def _(options, parts, primals, tangents):
    (lhs, rhs), (lhs_tangent, rhs_tangent) = primals, tangents
    out = _split(lhs, rhs, options, parts)
    terms = []
    if not isinstance(lhs_tangent, SymbolicZero):
        terms.append(_split(lhs_tangent, rhs, options, parts))
    if not isinstance(rhs_tangent, SymbolicZero):
        terms.append(_kernel_tangent(lhs, rhs_tangent, options, parts))
    return out, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(out)


@functools.partial(jax.jit, static_argnums=(2, 3))
@functools.partial(jax.checkpoint, static_argnums=(2, 3), prevent_cse=False)
def _kernel_tangent(lhs: jax.Array, rhs_tangent: jax.Array, options: _Options, parts: int):
    """The plain convolution, computed by parts (a 1x1 kernel's as a product) on CPUs.

    Its transpose is the weight gradient that is wanted: a sum over parts, or one product.
    Rematerialised, so that `lhs` is kept for the backward pass and not its parts.
    """
    plain = functools.partial(_plain, options=options)

    def as_product(lhs, rhs_tangent):
        rows, columns = options.window_strides
        return lax.dot_general(
            lhs[:, ::rows, ::columns],
            rhs_tangent[0, 0],
            (((3,), (0,)), ((), ())),
            precision=options.precision,
            preferred_element_type=options.preferred_element_type,
        )

    def by_parts(lhs, rhs_tangent):
        # Part p holds every P-th example: where the batch lies on several devices, each has its
        # share of every part, and no example is sent.
        split = lhs.reshape(-1, parts, *lhs.shape[1:])
        outs = [plain(split[:, part], rhs_tangent) for part in range(parts)]
        return jnp.stack(outs, axis=1).reshape(-1, *outs[0].shape[1:])

    fast = as_product if _is_pointwise(rhs_tangent, options) else by_parts
    return lax.platform_dependent(lhs, rhs_tangent, cpu=fast, default=plain)
