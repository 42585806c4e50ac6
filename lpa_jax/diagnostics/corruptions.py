r"""Common corruptions of images, on the device, to measure how accuracy falls with severity.

A corruption is an `Augmentation` of `lpa_jax.data.augment`: a pure function of (rng, images,
positions) that can be compiled; example i depends on fold_in(rng, positions[i]) only, not on its
batch. Images are uint8 in 0..255 or floating in [0, 1], [B, H, W, ch], before normalisation; they
keep shape and dtype, values are clipped to the range (and uint8 rounded). Severities are 1 to 5.

Relation to Hendrycks and Dietterich, ICLR 2019 (arXiv 1903.12261): `gaussian_noise`, `shot_noise`,
`contrast`, `brightness`, `pixelate` and `gaussian_blur` follow their definitions with the constants
of their CIFAR-10-C (blur and pixelate are in pixels of 32 x 32 images, at any image size).
Differences: noise is drawn from `rng` and not fixed in a file; images are converted to uint8 only
if they were uint8; `pixelate` averages exact areas and does not use PIL's box filter. `rotation`,
`translation` and `occlusion` are not among theirs, and their severities are this library's. So
results are comparable between models here, but not with published CIFAR-10-C tables.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from lpa_jax import checks
from lpa_jax.data import augment
from lpa_jax.data.augment.base import as_before, as_unit, keys_of

Array = jax.Array
# (key, image [H, W, ch] in [0, 1], strength) -> image
Corruption = Callable[[Array, Array, float], Array]

_TABLE: dict[str, tuple[Corruption, tuple[float, ...]]] = {}


def names() -> tuple[str, ...]:
    """Names of all corruptions, sorted.

    Example:
      >>> names()[:3]
      ('brightness', 'contrast', 'gaussian_blur')
    """
    return tuple(sorted(_TABLE))


def create(name: str, severity: int) -> augment.Augmentation:
    """Builds a corruption by name.

    Args:
      name: One of `names()`.
      severity: 1 (weak) to 5 (strong).

    Returns:
      (rng, images [B, H, W, ch], positions int [B]) -> images; see the module for units.

    Raises:
      ValueError: Unknown name or severity; when called, images of another rank or type, positions
        that do not fit, or (outside jit) floating images outside [0, 1].

    Example:
      >>> images = jnp.full((2, 8, 8, 1), 128, jnp.uint8)
      >>> brighter = jax.jit(create("brightness", severity=2))
      >>> int(brighter(jax.random.key(0), images, jnp.arange(2))[0, 0, 0, 0])  # 128 + 0.1 * 255
      154
    """
    checks.choice("name", name, names())
    corrupt, strengths = _TABLE[name]
    checks.integer("severity", severity, 1, len(strengths))
    strength = strengths[severity - 1]

    def apply(rng, images, positions):
        unit = as_unit(images)
        keys = keys_of(rng, unit, jnp.asarray(positions))
        corrupted = jax.vmap(lambda key, image: corrupt(key, image, strength))(keys, unit)
        return as_before(jnp.clip(corrupted, 0.0, 1.0), images.dtype)

    return apply


def _register(*strengths: float) -> Callable[[Corruption], Corruption]:
    """Registers a function under its own name, with five strengths."""

    def add(corrupt):
        _TABLE[corrupt.__name__] = (corrupt, strengths)
        return corrupt

    return add


@_register(0.04, 0.06, 0.08, 0.09, 0.10)
def gaussian_noise(key: Array, image: Array, strength: float) -> Array:
    """Adds N(0, strength^2) to every value."""
    return image + strength * jax.random.normal(key, image.shape, image.dtype)


@_register(500.0, 250.0, 100.0, 75.0, 50.0)
def shot_noise(key: Array, image: Array, strength: float) -> Array:
    """Counts photons: Poisson(strength x) / strength."""
    return jax.random.poisson(key, strength * image).astype(image.dtype) / strength


@_register(0.4, 0.6, 0.7, 0.8, 1.0)
def gaussian_blur(key: Array, image: Array, strength: float) -> Array:
    """Convolves with a Gaussian of `strength` pixels, cut at 4 deviations, borders repeated."""
    del key
    rows, columns = (_blur_matrix(size, strength) for size in image.shape[:2])
    return _separable(rows, columns, image)


@_register(0.75, 0.5, 0.4, 0.3, 0.15)
def contrast(key: Array, image: Array, strength: float) -> Array:
    """Pulls every channel towards its mean over the image: mean + strength (x - mean)."""
    del key
    mean = jnp.mean(image, axis=(0, 1), keepdims=True)
    return mean + strength * (image - mean)


@_register(0.05, 0.1, 0.15, 0.2, 0.3)
def brightness(key: Array, image: Array, strength: float) -> Array:
    """Adds `strength` to the value V of HSV, V = max over channels; hue and saturation stay."""
    del key
    value = jnp.max(image, axis=-1, keepdims=True)
    brighter = jnp.minimum(value + strength, 1.0)
    # Black has neither hue nor saturation and turns grey.
    return jnp.where(value > 0, image * (brighter / jnp.where(value > 0, value, 1.0)), brighter)


@_register(0.95, 0.9, 0.85, 0.75, 0.65)
def pixelate(key: Array, image: Array, strength: float) -> Array:
    """Averages areas to floor(strength size) pixels per side, then repeats them to the old size."""
    del key
    rows, columns = (_pixelate_matrix(size, strength) for size in image.shape[:2])
    return _separable(rows, columns, image)


@_register(5.0, 10.0, 15.0, 22.5, 30.0)
def rotation(key: Array, image: Array, strength: float) -> Array:
    """Rotates about the centre by `strength` degrees, left or right at random; zeros outside."""
    angle = jnp.deg2rad(strength) * jax.random.rademacher(key, (), image.dtype)
    centre = (jnp.asarray(image.shape[:2], image.dtype) - 1) / 2
    rows, columns = jnp.indices(image.shape[:2], image.dtype)
    rows, columns = rows - centre[0], columns - centre[1]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return _sample(
        image, cos * rows - sin * columns + centre[0], sin * rows + cos * columns + centre[1]
    )


@_register(0.05, 0.1, 0.15, 0.2, 0.25)
def translation(key: Array, image: Array, strength: float) -> Array:
    """Shifts by `strength` times the shorter side in a random direction; fills with zeros."""
    angle = jax.random.uniform(key, (), image.dtype, 0.0, 2 * np.pi)
    length = strength * min(image.shape[:2])
    rows, columns = jnp.indices(image.shape[:2], image.dtype)
    return _sample(image, rows - length * jnp.sin(angle), columns - length * jnp.cos(angle))


@_register(0.2, 0.3, 0.4, 0.5, 0.6)
def occlusion(key: Array, image: Array, strength: float) -> Array:
    """Blackens a square inside the image of side round(strength times the shorter side)."""
    side = max(1, round(strength * min(image.shape[:2])))
    limits = jnp.asarray(image.shape[:2]) - side + 1
    corner = jax.random.randint(key, (2,), 0, limits)
    rows, columns = jnp.indices(image.shape[:2])
    rows, columns = rows - corner[0], columns - corner[1]
    hidden = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    return jnp.where(hidden[..., None], 0.0, image)


def _separable(rows: np.ndarray, columns: np.ndarray, image: Array) -> Array:
    """Rows . image . columns^T for every channel."""
    rows, columns = (jnp.asarray(matrix, image.dtype) for matrix in (rows, columns))
    return jnp.einsum("ij,jkc,lk->ilc", rows, image, columns, precision=jax.lax.Precision.HIGHEST)


def _blur_matrix(size: int, deviation: float) -> np.ndarray:
    reach = int(4 * deviation + 0.5)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / deviation) ** 2)
    sources = np.clip(np.arange(size)[:, None] + offsets, 0, size - 1)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], sources), weights / weights.sum())
    return matrix


def _pixelate_matrix(size: int, share: float) -> np.ndarray:
    """[size, size]: area averages over floor(share size) equal intervals, repeated."""
    coarse = max(1, int(share * size))
    edges = np.linspace(0, size, coarse + 1)[:, None]
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    averages = np.maximum(overlap, 0) * (coarse / size)
    return averages[((pixels + 0.5) * coarse / size).astype(int)]


def _sample(image: Array, rows: Array, columns: Array) -> Array:
    """The image at fractional positions, bilinear, zero outside."""
    channels = jnp.moveaxis(image, -1, 0)
    sampled = jax.vmap(lambda plane: map_coordinates(plane, [rows, columns], order=1))(channels)
    return jnp.moveaxis(sampled, 0, -1)
