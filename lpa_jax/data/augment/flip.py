"""Mirroring."""

import jax
import jax.numpy as jnp

from lpa_jax.data.augment.base import Augmentation, keys_of


def flip() -> Augmentation:
    """The left-right flip of each image with probability 1/2.

    Example:
      >>> images = jnp.arange(4.0).reshape(1, 1, 4, 1)
      >>> flipped = flip()(jax.random.key(1), images, jnp.arange(1)).ravel().tolist()
      >>> flipped in ([0, 1, 2, 3], [3, 2, 1, 0])
      True
    """

    def augment(rng, images, positions):
        flipped = jax.vmap(jax.random.bernoulli)(keys_of(rng, images, positions))
        return jnp.where(flipped.reshape(-1, 1, 1, 1), images[:, :, ::-1], images)

    return augment
