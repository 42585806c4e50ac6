"""Augmentation on the device and normalisation, against slow NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import data
from lpa_jax.data import augment

SHAPE = (64, 6, 5, 2)
# no zeros inside: every zero in a result is padding or a hole
IMAGES = np.random.default_rng(0).integers(1, 256, SHAPE).astype(np.uint8)
POSITIONS = np.arange(64)
RNG = jax.random.key(0)


def _run(name, images=IMAGES, positions=POSITIONS, rng=RNG, **options):
    function = jax.jit(augment.create(name, **options))
    return np.asarray(function(rng, jnp.asarray(images), jnp.asarray(positions)))


def _offset_of(image, result, padding):
    """The one (row, column) offset at which NumPy's pad and slice give the result, or None."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    found = [
        (row, column)
        for row in range(2 * padding + 1)
        for column in range(2 * padding + 1)
        if np.array_equal(padded[row : row + height, column : column + width], result)
    ]
    return found[0] if len(found) == 1 else None


def test_crop_cuts_the_padded_image_at_every_offset():
    images, positions = np.repeat(IMAGES, 8, axis=0), np.arange(512)
    cropped = _run("crop", images, positions, padding=2)
    offsets = [_offset_of(*pair, padding=2) for pair in zip(images, cropped, strict=True)]
    assert None not in offsets
    _, counts = np.unique(offsets, axis=0, return_counts=True)
    assert len(counts) == 25
    # about 20 each; six standard deviations are 27
    assert counts.max() < 48


def test_crop_without_padding_changes_nothing():
    np.testing.assert_array_equal(_run("crop", padding=0), IMAGES)


def test_flip_mirrors_about_half_of_the_images():
    flipped = _run("flip")
    mirrored = (flipped == IMAGES[:, :, ::-1]).all((1, 2, 3))
    kept = (flipped == IMAGES).all((1, 2, 3))
    assert (mirrored ^ kept).all()
    assert 16 < mirrored.sum() < 48  # four standard deviations


@pytest.mark.parametrize("size", [1, 2, 3])
def test_cutout_is_one_square_cut_off_at_the_border(size):
    result = _run("cutout", cutout_size=size)
    centres = set()
    for image, cut in zip(IMAGES, result, strict=True):
        candidates = []
        for row in range(6):
            for column in range(5):
                expected = image.copy()
                top, left = row - size // 2, column - size // 2
                expected[max(top, 0) : top + size, max(left, 0) : left + size] = 0
                if np.array_equal(expected, cut):
                    candidates.append((row, column))
        assert candidates
        centres.add(candidates[0])
    assert len(centres) > 15


def test_none_is_the_identity():
    np.testing.assert_array_equal(_run("none"), IMAGES)


@pytest.mark.parametrize("name", ["crop", "flip", "cutout", "crop+flip+cutout"])
def test_augmentation_does_not_depend_on_how_the_batch_is_spread(name):
    options = {"padding": 2, "cutout_size": 3}
    whole = _run(name, **options)
    first, second = np.split(POSITIONS, 2)
    halves = [_run(name, IMAGES[part], part, **options) for part in (first, second)]
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    # and examples of one batch, and two steps, differ
    assert not np.array_equal(_run(name, IMAGES, POSITIONS[::-1].copy(), **options), whole)
    assert not np.array_equal(_run(name, rng=jax.random.key(1), **options), whole)


def test_a_chain_applies_its_parts_from_the_left_with_streams_of_their_own():
    @jax.jit
    def expected(images, positions):
        cropped = augment.crop(2)(jax.random.fold_in(RNG, 0), images, positions)
        return augment.flip()(jax.random.fold_in(RNG, 1), cropped, positions)

    np.testing.assert_array_equal(_run("crop+flip", padding=2), expected(IMAGES, POSITIONS))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, jnp.bfloat16])
def test_shape_and_dtype_are_kept(dtype):
    result = _run("crop+flip+cutout", IMAGES.astype(dtype))
    assert (result.shape, result.dtype) == (SHAPE, dtype)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: augment.create("shear"),
         "augmentation must be none or a chain of crop, .*, got 'shear' in 'shear'"),
        (lambda: augment.create("crop+none"),
         r"augmentation must be none or a chain of crop, .*, got 'none' in 'crop\+none'"),
        (lambda: augment.create(""),
         "augmentation must be none or a chain of crop, .*, got '' in ''"),
        (lambda: augment.create("crop", padding=-1), "padding must be a whole number >= 0, got -1"),
        (lambda: augment.create("cutout", cutout_size=0),
         "size must be a whole number >= 1, got 0"),
        (lambda: _run("crop", IMAGES[0]), r"images must be \[B, H, W, ch\], got shape \(6, 5, 2\)"),
        (lambda: _run("flip", positions=POSITIONS[:3]),
         r"positions must be one for each of 64 images, got shape \(3,\)"),
    ],
)  # fmt: skip
def test_bad_augmentations_get_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_normalization_is_computed_channel_by_channel():
    images = np.random.default_rng(1).integers(0, 256, (9000, 2, 3, 2)).astype(np.uint8)
    scale = data.Normalization.fit(images)
    pixels = images.reshape(-1, 2).astype(np.float64)
    np.testing.assert_allclose(scale.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scale.std, pixels.std(0), rtol=1e-12)
    result = scale.apply(images)
    assert (type(result), result.dtype) == (np.ndarray, np.float32)
    np.testing.assert_allclose(result.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(result.std((0, 1, 2)), 1, atol=1e-4)


def test_normalization_on_device_equals_the_host():
    scale = data.Normalization.fit(IMAGES)
    on_device = jax.jit(scale.apply)(jnp.asarray(IMAGES))
    assert on_device.dtype == jnp.float32
    np.testing.assert_allclose(on_device, scale.apply(IMAGES), rtol=1e-6)
    np.testing.assert_array_equal(scale.apply(IMAGES[0]), scale.apply(IMAGES)[0])


def test_a_large_mean_costs_no_digits_and_a_constant_channel_becomes_zero():
    noise = np.random.default_rng(2).normal(size=(500, 2, 2, 1)).astype(np.float32)
    images = np.concatenate([noise + np.float32(1e5), np.full_like(noise, 7)], axis=3)
    scale = data.Normalization.fit(images)
    np.testing.assert_allclose(scale.std[0], images[..., 0].astype(np.float64).std(), rtol=1e-12)
    assert scale.std[1] == 1
    np.testing.assert_array_equal(scale.apply(images)[..., 1], 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: data.Normalization((0,), (1, 1)),
            "mean and std must be equally many channels, at least 1, got 1 and 2",
        ),
        (lambda: data.Normalization((), ()), "at least 1"),
        (lambda: data.Normalization((0,), (0,)), "std must be finite and > 0, got 0 at position 0"),
        (lambda: data.Normalization((np.nan,), (1,)), "mean must be finite, got nan at position 0"),
        (lambda: data.Normalization.fit(IMAGES[:0]), "must be a non-empty"),
        (lambda: data.Normalization((0,), (1,)).apply(IMAGES), "must have 1 channels"),
    ],
)
def test_bad_normalizations_get_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
