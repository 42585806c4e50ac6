"""Changing colours: brightness, contrast, saturation and hue at random, and grey images."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lpa_jax import checks
from lpa_jax.data.augment.base import Augmentation, as_before, as_unit, keys_of

Array = jax.Array
# Shares of red, green and blue in the luma of ITU-R BT.601, which Pillow and torchvision take.
_LUMA = (0.299, 0.587, 0.114)
_BLENDS = 3  # brightness, contrast, saturation


class Jitter(NamedTuple):
    """How the colours of one image change.

    Attributes:
      factors: Factors of brightness, contrast and saturation, [3]; 1 changes nothing.
      order: In which they are applied, a permutation of 0..2.
      turn: Turn of the hue, in turns.
      place: After how many of them the hue is turned, 0..3.
    """

    factors: Array
    order: Array
    turn: Array
    place: Array


def color_jitter(
    brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.0
) -> Augmentation:
    r"""The colour jitter: four changes of each image in a random order.

    With x in [0, 1], g(x) = 0.299 R + 0.587 G + 0.114 B, and f ~ U(max(0, 1 - s), 1 + s) for each
    strength s, the first three are blends f x + (1 - f) o, clipped to [0, 1]:

    | change | o |
    |---|---|
    | brightness | 0 |
    | contrast | mean of g(x) over the image |
    | saturation | g(x) of the pixel |

    The hue is turned by U(-hue, hue) turns at the same saturation and value (HSV). All orders are
    equally likely. Nothing is rounded in between. Images of one channel are grey: saturation and
    hue change nothing. Strengths of 0 change nothing.

    Args:
      brightness: Strength, at least 0.
      contrast: Strength, at least 0.
      saturation: Strength, at least 0.
      hue: Largest turn, in [0, 1/2].

    Raises:
      ValueError: A strength out of range; when called, images without 1 or 3 channels, of another
        type than uint8 or floating, or (outside jit) floating ones outside [0, 1].

    Example:
      >>> images = jnp.full((2, 4, 4, 3), 128, jnp.uint8)
      >>> jax.jit(color_jitter())(jax.random.key(0), images, jnp.arange(2)).shape
      (2, 4, 4, 3)

    References:
      Krizhevsky et al., NIPS 2012, section 4.1, for the idea; definitions as torchvision's
      ColorJitter.
    """
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    for name, strength in strengths.items():
        checks.number(name, strength)
    checks.number("hue", hue, 0.0, 0.5)

    def augment(rng, images, positions):
        keys = keys_of(rng, images, positions)
        _check_channels(images)
        if not (any(strengths.values()) or hue):
            return images
        jitters = draw_jitters(keys, tuple(strengths.values()), hue)
        return as_before(jitter_colors(as_unit(images), jitters, turns=hue > 0), images.dtype)

    return augment


def draw_jitters(keys: Array, strengths: tuple[float, float, float], hue: float) -> Jitter:
    """One random jitter a key, with a leading axis [B] in every field.

    Example:
      >>> @jax.jit
      ... def draw(rng):
      ...     return draw_jitters(jax.random.split(rng, 5), (0.0, 0.4, 0.4), hue=0.1)
      >>> draw(jax.random.key(0)).factors[:, 0].tolist()
      [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    low = jnp.array([max(0.0, 1.0 - strength) for strength in strengths])
    high = jnp.array([1.0 + strength for strength in strengths])

    def draw(key):
        # One call for everything: each is a program of its own to compile.
        uniform = jax.random.uniform(key, (2 * _BLENDS + 2,))
        return Jitter(
            low + (high - low) * uniform[:_BLENDS],
            jnp.argsort(uniform[_BLENDS:-2]),
            hue * (2 * uniform[-2] - 1),
            jnp.floor((_BLENDS + 1) * uniform[-1]).astype(jnp.int32),
        )

    return jax.vmap(draw)(keys)


def jitter_colors(images: Array, jitters: Jitter, turns: bool = True) -> Array:
    """The images with their colours changed.

    Args:
      images: In [0, 1], [B, H, W, ch] with 1 or 3 channels.
      jitters: One an image.
      turns: Whether any hue is turned; without, that part is not computed.

    Returns:
      [B, H, W, ch] in [0, 1].

    Example:
      >>> darker = Jitter(jnp.array([[0.5, 1, 1]]), jnp.arange(3)[None], jnp.zeros(1), jnp.zeros(1))
      >>> jax.jit(jitter_colors)(jnp.full((1, 1, 1, 3), 0.5), darker).ravel().tolist()
      [0.25, 0.25, 0.25]
    """

    def jitter(image, jitter):
        def blended(image, taken):
            for number in range(_BLENDS):
                which = jitter.order[number]
                # A blend that is not taken here has the factor 1, which changes nothing.
                factor = jnp.where(taken(number), jitter.factors[which], 1.0)
                image = _blend(image, which, factor)
            return image

        if not turns or image.shape[-1] == 1:
            return blended(image, lambda number: True)
        # The hue, the costly part, is turned once, between those before and those after it.
        image = blended(image, lambda number: number < jitter.place)
        image = _turn_hue(image, jitter.turn)
        return blended(image, lambda number: number >= jitter.place)

    return jax.vmap(jitter)(images, jitters)


def grayscale(probability: float = 0.1) -> Augmentation:
    """The augmentation that makes an image grey with a probability.

    Every channel becomes 0.299 R + 0.587 G + 0.114 B; images of one channel stay as they are.

    Args:
      probability: In [0, 1]; 0 changes nothing.

    Raises:
      ValueError: A probability out of range; when called, images without 1 or 3 channels, of
        another type than uint8 or floating, or (outside jit) floating ones outside [0, 1].

    Example:
      >>> images = jnp.zeros((1, 1, 1, 3), jnp.uint8).at[..., 0].set(100)
      >>> jax.jit(grayscale(1.0))(jax.random.key(0), images, jnp.arange(1)).ravel().tolist()
      [30, 30, 30]
    """
    checks.number("probability", probability, 0.0, 1.0)

    def augment(rng, images, positions):
        keys = keys_of(rng, images, positions)
        _check_channels(images)
        chosen = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
        grey = jnp.broadcast_to(_grey(as_unit(images)), images.shape)
        return jnp.where(chosen.reshape(-1, 1, 1, 1), as_before(grey, images.dtype), images)

    return augment


def _check_channels(images: Array) -> None:
    if images.shape[-1] not in (1, 3):
        raise ValueError(
            f"images must have 1 or 3 channels to change their colours, got {images.shape[-1]}"
        )


def _grey(images: Array) -> Array:
    """The luma, [..., 1]."""
    if images.shape[-1] == 1:
        return images
    red, green, blue = (images[..., channel : channel + 1] for channel in range(3))
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def _blend(image: Array, which: Array, factor: Array) -> Array:
    """Brightness (0), contrast (1) or saturation (2) changed by a factor."""
    grey = _grey(image)
    towards = jnp.where(which == 0, 0.0, jnp.where(which == 1, jnp.mean(grey), grey))
    return jnp.clip(factor * image + (1 - factor) * towards, 0.0, 1.0)


def _turn_hue(image: Array, turn: Array) -> Array:
    """The hue turned at the same saturation and value."""
    red, green, blue = (image[..., channel] for channel in range(3))
    value, lowest = jnp.max(image, axis=-1), jnp.min(image, axis=-1)
    chroma = value - lowest
    # Grey pixels have no hue, and none is needed: nothing is divided by 0 for them.
    divisor = jnp.where(chroma > 0, chroma, 1.0)
    # Channels are compared with each other, not with the value: compiled apart from them, it may
    # differ from all three in the last bit.
    sixths = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) / divisor,
        jnp.where(green >= blue, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    # A channel falls from the value to the lowest over a sixth of a turn, and rises again.
    away = jnp.stack([(offset + sixths + 6 * turn) % 6 for offset in (5, 3, 1)], axis=-1)
    share = jnp.clip(jnp.minimum(away, 4 - away), 0, 1)
    return value[..., None] - chroma[..., None] * share
