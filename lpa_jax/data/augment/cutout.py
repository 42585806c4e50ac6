"""Covering a square."""

import jax
import jax.numpy as jnp

from lpa_jax import checks
from lpa_jax.data.augment.base import Augmentation, keys_of


def cutout(size: int = 8) -> Augmentation:
    """Cutout: a square of zeros, centred on any pixel and cut off at the border.

    The square covers rows r - floor(size/2) .. r + ceil(size/2) - 1, the columns likewise, with the
    centre (r, c) uniform over the image.

    Args:
      size: Side of the square in pixels, at least 1.

    Raises:
      ValueError: `size` is not a positive integer.

    Example:
      >>> images = jnp.ones((1, 3, 3, 1), jnp.uint8)
      >>> int(jax.jit(cutout(size=1))(jax.random.key(0), images, jnp.arange(1)).sum())
      8

    References:
      DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout",
      2017.
    """
    size = checks.integer("size", size, minimum=1)

    def augment(rng, images, positions):
        keys = keys_of(rng, images, positions)
        height, width = images.shape[1:3]
        limits = jnp.array([height, width])
        centres = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, limits))(keys)

        def covered(length, centre):
            start = (centre - size // 2)[:, None]
            place = jnp.arange(length)[None, :]
            return (place >= start) & (place < start + size)

        rows, columns = covered(height, centres[:, 0]), covered(width, centres[:, 1])
        hole = rows[:, :, None, None] & columns[:, None, :, None]
        return jnp.where(hole, jnp.zeros((), images.dtype), images)

    return augment
