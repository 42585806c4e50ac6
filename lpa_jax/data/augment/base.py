"""What an augmentation is, the identity, and one after the other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lpa_jax.checks import function, is_known

# (rng, images [B, H, W, ch], positions int [B] in the global batch) -> images [B, H, W, ch]
Augmentation = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def keys_of(rng: jax.Array, images: jax.Array, positions: jax.Array) -> jax.Array:
    """One key an example, fold_in(rng, position), [B].

    Raises:
      ValueError: Images that are not [B, H, W, ch], or positions that are not one for each.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be [B, H, W, ch], got shape {images.shape}")
    if positions.shape != images.shape[:1]:
        raise ValueError(
            f"positions must be one for each of {len(images)} images, got shape {positions.shape}"
        )
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, positions)


def none() -> Augmentation:
    """The identity.

    Example:
      >>> none()(jax.random.key(0), jnp.ones((1, 2, 2, 1)), jnp.arange(1)).shape
      (1, 2, 2, 1)
    """
    return lambda rng, images, positions: images


def compose(*augmentations: Augmentation) -> Augmentation:
    """The augmentations one after the other, the k-th with the stream fold_in(rng, k).

    Example:
      >>> nothing = jax.jit(compose(none(), none()))
      >>> nothing(jax.random.key(0), jnp.ones((2, 4, 4, 1)), jnp.arange(2)).shape
      (2, 4, 4, 1)
    """
    for place, augmentation in enumerate(augmentations):
        name = f"augmentations[{place}]"
        function(name, augmentation, "rng", "images", "positions")

    def augment(rng, images, positions):
        for number, augmentation in enumerate(augmentations):
            images = augmentation(jax.random.fold_in(rng, number), images, positions)
        return images

    return augment


def as_unit(images: jax.Array) -> jax.Array:
    """Images as floating numbers in [0, 1], of at least float32: uint8 divided by 255.

    Raises:
      ValueError: Images of another rank or type, or (outside jit) floating ones outside [0, 1].

    Example:
      >>> as_unit(jnp.full((1, 1, 1, 1), 51, jnp.uint8)).ravel()
      Array([0.2], dtype=float32)
    """
    images = jnp.asarray(images)
    if images.ndim != 4 or not images.size:
        raise ValueError(f"images must be a non-empty [B, H, W, ch], got shape {images.shape}")
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be uint8 or floating, got {images.dtype}")
    if is_known(images):
        low, high = float(jnp.min(images)), float(jnp.max(images))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"floating images must be in [0, 1], got {low:g} to {high:g}")
    return images.astype(jnp.promote_types(images.dtype, jnp.float32))


def as_before(images: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Images of `as_unit` in the type that they had; uint8 is rounded.

    Example:
      >>> as_before(jnp.full((1, 1, 1, 1), 0.3), jnp.dtype("uint8")).ravel()
      Array([76], dtype=uint8)
    """
    return jnp.round(images * 255).astype(dtype) if dtype == jnp.uint8 else images.astype(dtype)
