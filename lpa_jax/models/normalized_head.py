"""A classifier of cosines, for losses that bound the logits by themselves, such as LDAM."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class NormalizedHead(nn.Module):
    """Cosines between features and class weights: `[B, F]` to logits `[B, C]` in [-1, 1].

        z_c = <w_c, h> / (||w_c|| ||h||)

    Without a bias. A softmax over cosines is nearly flat, so the loss must scale them: this head
    belongs to `losses.ldam` with its published scale of 30. Computed in at least float32, as the
    linear head is.

    Attributes:
        num_classes: Number of classes `C`.
        dtype: Floating type of the computation, or `None`, as in `base.StagedModel`.

    Source: Cao et al., NeurIPS 2019 (arXiv 1906.07413), whose classifier this is.

    Example:
        >>> head = NormalizedHead(2, None)
        >>> weights = {"params": {"kernel": jnp.array([[2.0, 3.0], [0.0, 4.0]])}}
        >>> cosines = head.apply(weights, jnp.array([[5.0, 0.0]]), False)
        >>> [round(float(cosine), 4) for cosine in cosines[0]]  # 1, 3 / 5
        [1.0, 0.6]
    """

    num_classes: int
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the cosines in at least float32."""
        del train
        initial = nn.initializers.lecun_normal()
        kernel = self.param("kernel", initial, (x.shape[-1], self.num_classes))
        dtype = jnp.promote_types(self.dtype or x.dtype, jnp.float32)
        return unit_vectors(x.astype(dtype), -1) @ unit_vectors(kernel.astype(dtype), 0)


def unit_vectors(x: jax.Array, axis: int) -> jax.Array:
    """The vectors along `axis` at length 1; a zero vector stays zero, and so does its gradient.

    >>> [round(float(entry), 4) for entry in unit_vectors(jnp.array([3.0, -4.0]), axis=0)]
    [0.6, -0.8]
    """
    # Scaled by the largest entry first, so that no square of a small or large one is lost.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    nonzero = largest > 0
    scaled = x / jnp.where(nonzero, largest, 1.0)
    squares = jnp.sum(scaled**2, axis=axis, keepdims=True)
    return jnp.where(nonzero, scaled * jax.lax.rsqrt(jnp.where(nonzero, squares, 1.0)), 0.0)
