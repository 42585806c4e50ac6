"""Augmentation on the device: pure functions of (rng, images, positions), one key per example.

Example i is augmented with fold_in(rng, positions[i]) and nothing else, so the result does not
depend on how the batch is spread over devices and hosts. Images keep their shape and dtype, and
what lies outside an image is 0: augment uint8 images before normalisation, where 0 is black.
Where colours are changed, floating images must lie in [0, 1].
"""

from lpa_jax.data.augment.base import Augmentation, compose, none
from lpa_jax.data.augment.color import color_jitter, grayscale
from lpa_jax.data.augment.crop import crop
from lpa_jax.data.augment.cutout import cutout
from lpa_jax.data.augment.flip import flip
from lpa_jax.data.augment.resized_crop import random_resized_crop

NAMES = ("none", "crop", "resized_crop", "flip", "cutout", "jitter", "grayscale")


def create(
    name: str,
    *,
    padding: int = 4,
    cutout_size: int = 8,
    scale: tuple[float, float] = (0.08, 1.0),
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.0),
    grayscale_probability: float = 0.1,
) -> Augmentation:
    """The augmentation of a name, several joined by "+".

    Args:
      name: "none", or a chain of the other `NAMES` such as "resized_crop+flip+jitter+grayscale",
        applied from the left.
      padding: For "crop", pixels.
      cutout_size: For "cutout", side in pixels.
      scale: For "resized_crop", the range of the area that is kept, a share of the image's.
      jitter: For "jitter", the strengths of brightness, contrast, saturation and hue.
      grayscale_probability: For "grayscale".

    Returns:
      augment(rng, images [B, H, W, ch], positions int [B]) -> images; `positions` are those in the
      global batch (the "position" of `batches`), `rng` is the step's key.

    Raises:
      ValueError: An unknown name, "none" in a chain, or a number out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> augment = jax.jit(create("crop+flip", padding=2))
      >>> augment(jax.random.key(0), jnp.ones((2, 8, 8, 3)), jnp.arange(2)).shape
      (2, 8, 8, 3)
    """
    if name == "none":
        return none()
    parts = str(name).split("+")
    wrong = [part for part in parts if part not in NAMES or part == "none"]
    if wrong:
        raise ValueError(
            f"augmentation must be none or a chain of {', '.join(NAMES[1:])} joined by +, "
            f"got {wrong[0]!r} in {name!r}"
        )
    built = {
        "crop": crop(padding),
        "resized_crop": random_resized_crop(scale),
        "flip": flip(),
        "cutout": cutout(cutout_size),
        "jitter": color_jitter(*jitter),
        "grayscale": grayscale(grayscale_probability),
    }
    return compose(*(built[part] for part in parts))


__all__ = [
    "NAMES", "Augmentation", "color_jitter", "compose", "create", "crop", "cutout", "flip",
    "grayscale", "none", "random_resized_crop",
]  # fmt: skip
