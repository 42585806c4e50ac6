"""Cutting a box of random size and proportions out and resizing it to the whole image."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lpa_jax import checks
from lpa_jax.data.augment.base import Augmentation, keys_of

Array = jax.Array
# How often a box is drawn before the central one is taken.
ATTEMPTS = 10
# Uniform numbers that a box is made of: areas and proportions to try, and a corner.
DRAWS = 2 * ATTEMPTS + 2


class Boxes(NamedTuple):
    """Boxes of whole pixels inside images, int32 [B] each."""

    top: Array
    left: Array
    height: Array
    width: Array


def random_resized_crop(
    scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Augmentation:
    r"""The random resized crop: a box anywhere in the image, resized to the image's size.

    Of an image of H x W pixels,

        area = u H W,  u ~ U(scale),    log r ~ U(log ratio),
        width = round(sqrt(area r)),  height = round(sqrt(area / r)),

    up to ten times until the box fits; where none does, the largest central box whose ratio of
    width to height lies in the range. All places of the box are equally likely. Interpolation is
    bilinear and looks at nothing outside the box; a box is never shrunk, so there is nothing to
    smooth. Scale (1, 1) and ratio (1, 1) leave square images as they are.

    Args:
      scale: Lowest and highest share of the area, 0 < low <= high <= 1.
      ratio: Lowest and highest ratio of width to height, 0 < low <= high.

    Raises:
      ValueError: Not such a range.

    Example:
      >>> images = jnp.ones((2, 4, 4, 3), jnp.uint8)
      >>> jax.jit(random_resized_crop())(jax.random.key(0), images, jnp.arange(2)).shape
      (2, 4, 4, 3)

    References:
      Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, section 6; the attempts and the
      rounding are those of torchvision's RandomResizedCrop, here with the image's own size.
    """
    scale = checked_range("scale", scale, highest=1.0)
    ratio = checked_range("ratio", ratio, highest=math.inf)

    def augment(rng, images, positions):
        keys = keys_of(rng, images, positions)
        return resize_boxes(images, draw_boxes(keys, *images.shape[1:3], scale, ratio))

    return augment


def draw_boxes(
    keys: Array, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Boxes:
    """One random box a key, inside images of `height` x `width` pixels.

    Example:
      >>> @jax.jit
      ... def draw(rng):
      ...     return draw_boxes(jax.random.split(rng, 3), 4, 4, (1.0, 1.0), (1.0, 1.0))
      >>> draw(jax.random.key(0)).width
      Array([4, 4, 4], dtype=int32)
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    central = jnp.array(central_box(height, width, ratio))

    def draw(key):
        uniform = jax.random.uniform(key, (DRAWS,))
        areas, ratios, corner = jnp.split(uniform, (ATTEMPTS, 2 * ATTEMPTS))
        areas = height * width * (scale[0] + (scale[1] - scale[0]) * areas)
        ratios = jnp.exp(low + (high - low) * ratios)
        boxes = jnp.stack([jnp.sqrt(areas / ratios), jnp.sqrt(areas * ratios)], axis=1)
        boxes = jnp.round(boxes).astype(jnp.int32)
        size = jnp.array([height, width])
        fits = jnp.all((boxes > 0) & (boxes <= size[None, :]), axis=1)
        found = jnp.any(fits)
        box = jnp.where(found, boxes[jnp.argmax(fits)], central)
        room = size - box
        anywhere = jnp.floor(corner * (room + 1)).astype(jnp.int32)
        corner = jnp.where(found, anywhere, room // 2)
        return Boxes(corner[0], corner[1], box[0], box[1])

    return jax.vmap(draw)(keys)


def resize_boxes(images: Array, boxes: Boxes) -> Array:
    """Each image's box, resized to the image's size; integers are rounded.

    Args:
      images: [B, H, W, ch].
      boxes: One inside each image.

    Returns:
      [B, H, W, ch] of the same dtype.

    Example:
      >>> images = jnp.arange(4.0).reshape(1, 1, 4, 1)
      >>> half = Boxes(*(jnp.array([value]) for value in (0, 1, 1, 2)))
      >>> jax.jit(resize_boxes)(images, half).ravel().tolist()
      [1.0, 1.25, 1.75, 2.0]
    """
    dtype = images.dtype
    images = images.astype(jnp.promote_types(dtype, jnp.float32))
    rows = jax.vmap(_interpolation, in_axes=(0, 0, None))(boxes.top, boxes.height, images.shape[1])
    columns = jax.vmap(_interpolation, in_axes=(0, 0, None))(
        boxes.left, boxes.width, images.shape[2]
    )
    # Products of matrices suit accelerators, whose default precision would lose the last bits.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    resized = product("bij,bjkc->bikc", rows, images)
    resized = product("blk,bikc->bilc", columns, resized)
    return (jnp.round(resized) if jnp.issubdtype(dtype, jnp.integer) else resized).astype(dtype)


def _interpolation(start: Array, length: Array, size: int) -> Array:
    """Weights [size, size] that stretch `length` pixels from `start` to `size` pixels.

    Output pixel i lies at (i + 1/2) length/size - 1/2 in the box, moved to the nearest pixel centre
    where that is outside of all of them; weights fall to 0 linearly over one pixel.
    """
    pixels = jnp.arange(size, dtype=jnp.float32)
    place = jnp.clip((pixels + 0.5) * length / size - 0.5, 0, length - 1) + start
    return jnp.maximum(0, 1 - jnp.abs(place[:, None] - pixels[None, :]))


def central_box(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Height and width of the largest box with a ratio in the range.

    Example:
      >>> central_box(10, 40, (3 / 4, 2.0)), central_box(30, 30, (3 / 4, 4 / 3))
      ((10, 20), (30, 30))
    """
    if width / height < ratio[0]:
        return round(width / ratio[0]), width
    if width / height > ratio[1]:
        return height, round(height * ratio[1])
    return height, width


def checked_range(argument: str, value: tuple[float, float], highest: float) -> tuple[float, float]:
    """The two numbers.

    Raises:
      ValueError: Not two numbers, 0 < low <= high <= highest; names the argument.
    """
    allowed = "two numbers, 0 < low <= high" + (f" <= {highest:g}" if highest == 1 else "")
    try:
        low, high = (float(bound) for bound in value)
    except (TypeError, ValueError):
        low = high = math.nan
    checks.require(0 < low <= high <= highest and high < math.inf, argument, allowed, value)
    return low, high
