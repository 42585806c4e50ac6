"""Layers that several models share, and the classifiers at their end."""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lpa_jax.models.convolution import conv_general_dilated

# Normal with variance 2 / (k*k*C_out), which the ResNet and WideResNet releases use (He et al.,
# "Delving Deep into Rectifiers", arXiv 1502.01852, section 2.2, backward form).
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclasses.dataclass(frozen=True)
class Primitives:
    """The convolution and normalisation layers of a model, described once for all its blocks.

    Attributes are those of `NormalizedModel` (`kind` is its `norm`, `frozen` its `frozen_norm`).
    Both methods make submodules
    of the compact method that calls them.
    """

    kind: str
    groups: int
    axis_name: str | None
    momentum: float
    epsilon: float
    frozen: bool
    dtype: jnp.dtype | None

    def conv(
        self, x: jax.Array, features: int, size: int, stride: int = 1, *, name: str
    ) -> jax.Array:
        """Convolves `x`: `[B, H, W, F]` to `[B, H/stride, W/stride, features]`.

        The padding is (size - 1)/2 on both sides, as published; "SAME" would pad a stride-2
        convolution on one side only. A bias is left to the norm where there is one.
        """
        return nn.Conv(
            features,
            (size, size),
            strides=(stride, stride),
            padding=(size - 1) // 2,
            use_bias=self.kind == "none",
            kernel_init=he_normal_fan_out,
            dtype=self.dtype,
            conv_general_dilated=conv_general_dilated,
            name=name,
        )(x)

    def norm(
        self, x: jax.Array, *, train: bool, name: str, scale_init: Callable = nn.initializers.ones
    ) -> jax.Array:
        """Normalises `x`, `[B, H, W, F]`."""
        common = {
            "epsilon": self.epsilon,
            "dtype": self.dtype,
            "scale_init": scale_init,
            "name": name,
        }
        if self.kind == "batch":
            return nn.BatchNorm(
                use_running_average=self.frozen or not train,
                momentum=self.momentum,
                axis_name=self.axis_name,
                **common,
            )(x)
        if self.kind == "group":
            return nn.GroupNorm(num_groups=math.gcd(self.groups, x.shape[-1]), **common)(x)
        return x


class BlockStage(nn.Module):
    """A stage of equal blocks, the first of which carries the stage's stride.

    Attributes:
      block: Makes a block from `stride` and `name`; the block is called with `(x, train)`.
      count: Number of blocks.
      stride: Stride of the first block; the others have stride 1.
    """

    block: Callable[..., nn.Module]
    count: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Runs the blocks in order, `[B, H, W, F_in]` to `[B, H/stride, W/stride, F_out]`."""
        for index in range(self.count):
            stride = self.stride if index == 0 else 1
            x = self.block(stride=stride, name=f"block{index + 1}")(x, train)
        return x


class Head(nn.Module):
    """The linear classifier: pooled activations `[B, F]` to logits `[B, C]`.

    Computed in at least float32, because a softmax over half-precision logits loses the
    differences that a small perturbation makes.
    """

    num_classes: int
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`x @ kernel + bias` in at least float32."""
        del train
        dtype = None if self.dtype is None else jnp.promote_types(self.dtype, jnp.float32)
        return nn.Dense(self.num_classes, dtype=dtype, name="dense")(x)


class NormalizedHead(nn.Module):
    """Cosines between features and class weights: `[B, F]` to logits `[B, C]` in [-1, 1].

        z_c = <w_c, h> / (||w_c|| ||h||)

    Without a bias. A softmax over cosines is nearly flat, so the loss must scale them: this head
    belongs to `losses.ldam` with its published scale of 30. Computed in at least float32, as the
    linear head is.

    Attributes:
      num_classes: Number of classes `C`.
      dtype: Floating type of the computation, or `None`, as in `base.StagedModel`.

    Example:
      >>> head = NormalizedHead(2, None)
      >>> weights = {"params": {"kernel": jnp.array([[2.0, 3.0], [0.0, 4.0]])}}
      >>> cosines = head.apply(weights, jnp.array([[5.0, 0.0]]), False)
      >>> [round(float(cosine), 4) for cosine in cosines[0]]  # 1, 3 / 5
      [1.0, 0.6]

    References:
      Cao et al., NeurIPS 2019 (arXiv 1906.07413), whose classifier this is.
    """

    num_classes: int
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """The cosines in at least float32."""
        del train
        initial = nn.initializers.lecun_normal()
        kernel = self.param("kernel", initial, (x.shape[-1], self.num_classes))
        dtype = jnp.promote_types(self.dtype or x.dtype, jnp.float32)
        return unit_vectors(x.astype(dtype), -1) @ unit_vectors(kernel.astype(dtype), 0)


def unit_vectors(x: jax.Array, axis: int) -> jax.Array:
    """The vectors along `axis` at length 1; a zero vector stays zero, and so does its gradient.

    Example:
      >>> [round(float(entry), 4) for entry in unit_vectors(jnp.array([3.0, -4.0]), axis=0)]
      [0.6, -0.8]
    """
    # Scaled by the largest entry first, so that no square of a small or large one is lost.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    nonzero = largest > 0
    scaled = x / jnp.where(nonzero, largest, 1.0)
    squares = jnp.sum(scaled**2, axis=axis, keepdims=True)
    return jnp.where(nonzero, scaled * jax.lax.rsqrt(jnp.where(nonzero, squares, 1.0)), 0.0)


def global_average_pool(x: jax.Array, train: bool) -> jax.Array:
    """Averages over space: `[B, H, W, F]` to `[B, F]`."""
    del train
    return jnp.mean(x, axis=(1, 2))


def relu(x: jax.Array) -> jax.Array:
    """max(x, 0) with the derivative 0 at 0, for networks of convolutions.

    Values and derivatives are those of `nn.relu`. On CPUs, XLA computes a maximum with a constant,
    and everything elementwise before it, again for each part of a weight gradient
    (`lpa_jax.models.convolution`). It does not do so for a choice between two arrays.

    Example:
      >>> relu(jnp.array([-1.0, 0.0, 2.0, jnp.nan])).tolist()
      [0.0, 0.0, 2.0, nan]
    """
    return jnp.where(x <= 0, jnp.zeros_like(x), x)


def dropout(x: jax.Array, rate: float, train: bool) -> jax.Array:
    """Dropout of `x`, a submodule of the compact caller."""
    return nn.Dropout(rate, deterministic=not train, name="dropout")(x)
