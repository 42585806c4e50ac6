"""Padding and cutting the original size out anywhere."""

import jax
import jax.numpy as jnp

from lpa_jax import checks
from lpa_jax.data.augment.base import Augmentation, keys_of


def crop(padding: int = 4) -> Augmentation:
    """The random crop: pad each side with zeros, cut the original size out anywhere.

    Every one of the (2 padding + 1)^2 offsets is equally likely; the same as a shift by up to
    `padding` pixels each way with zeros moving in.

    Args:
      padding: Pixels, at least 0 (0 changes nothing).

    Raises:
      ValueError: `padding` is not a non-negative integer.

    Example:
      >>> images = jnp.ones((2, 4, 4, 1))
      >>> crop(padding=1)(jax.random.key(0), images, jnp.arange(2)).shape
      (2, 4, 4, 1)

    References:
      He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """
    padding = checks.integer("padding", padding, minimum=0)

    def augment(rng, images, positions):
        keys = keys_of(rng, images, positions)
        offsets = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 2 * padding + 1))(keys)
        side = (padding, padding)
        padded = jnp.pad(images, ((0, 0), side, side, (0, 0)))

        # measured at [128, 32, 32, 3] on 2 CPU cores: 0.1 ms, against 0.2 for gathers, 0.7 for a
        # chain of selects and 1.0 for one-hot matrix products
        def cut(image, offset):
            return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

        return jax.vmap(cut)(padded, offsets)

    return augment
