"""Corruptions: definitions by hand and by NumPy or SciPy, and what holds for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from lpa_jax.diagnostics import corruptions

KEY = jax.random.key(0)
RANDOM = ("gaussian_noise", "occlusion", "rotation", "shot_noise", "translation")


def images(count=3, size=(12, 10), channels=3, seed=0):
    smooth = np.random.default_rng(seed).random((count, *size, channels))
    return np.clip(ndimage.gaussian_filter(smooth, (0, 1, 1, 0)) * 2 - 0.5, 0, 1).astype(np.float32)


def corrupt(name, severity, batch, positions=None, key=KEY):
    positions = np.arange(len(batch)) if positions is None else positions
    return np.asarray(corruptions.create(name, severity)(key, batch, positions))


def test_every_corruption_keeps_the_contract():
    batch = images()
    bytes_batch = np.round(batch * 255).astype(np.uint8)
    for name in corruptions.names():
        apply = jax.jit(corruptions.create(name, 3))
        whole = np.asarray(apply(KEY, batch, np.arange(3)))
        assert whole.dtype == np.float32 and whole.shape == batch.shape
        assert whole.min() >= 0 and whole.max() <= 1 and not np.array_equal(whole, batch)
        # Neither the place in the batch nor the other images count.
        among_others = np.stack([batch[2], np.full_like(batch[1], 0.3), batch[0]])
        again = np.asarray(apply(KEY, among_others, np.arange(3)[::-1]))
        np.testing.assert_allclose(again[[2, 0]], whole[[0, 2]], atol=1e-5)
        of_bytes = corrupt(name, 3, bytes_batch)
        assert of_bytes.dtype == np.uint8
        if name != "shot_noise":  # whose counts jump with the last bit
            np.testing.assert_allclose(of_bytes / 255, whole, atol=2.1 / 255)
        other = np.asarray(apply(jax.random.key(7), batch, np.arange(3)))
        assert np.array_equal(other, whole) == (name not in RANDOM)


@pytest.mark.parametrize("name", corruptions.names())
def test_images_get_worse_with_severity(name):
    batch = images(count=20, size=(16, 16), channels=1)
    harm = [np.mean((corrupt(name, severity, batch) - batch) ** 2) for severity in (1, 3, 5)]
    assert np.all(np.diff(harm) > 0)


def test_gaussian_noise_has_its_deviation():
    grey = np.full((4, 40, 40, 1), 0.5, np.float32)
    noise = corrupt("gaussian_noise", 5, grey) - 0.5
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 0.1], atol=0.004)


def test_shot_noise_has_the_variance_of_counted_photons():
    grey = np.full((4, 40, 40, 1), 0.3, np.float32)
    noisy = corrupt("shot_noise", 5, grey)
    np.testing.assert_allclose(noisy * 50, np.round(noisy * 50), atol=1e-4)
    np.testing.assert_allclose([noisy.mean(), noisy.var()], [0.3, 0.3 / 50], rtol=0.07)


def test_contrast_and_brightness_by_hand():
    image = np.zeros((1, 1, 2, 3), np.float32)
    image[0, 0, 1] = [0.2, 0.4, 0.8]
    lower = corrupt("contrast", 2, image)
    np.testing.assert_allclose(lower[0, 0], [[0.05, 0.1, 0.2], [0.15, 0.3, 0.6]], rtol=1e-6)
    brighter = corrupt("brightness", 2, image)  # V from 0.8 to 0.9; black to grey
    np.testing.assert_allclose(brighter[0, 0], [[0.1] * 3, [0.225, 0.45, 0.9]], rtol=1e-6)


def test_blur_is_scipys_gaussian_with_repeated_borders():
    batch = images()
    expected = ndimage.gaussian_filter(batch, (0, 1, 1, 0), mode="nearest", truncate=4)
    np.testing.assert_allclose(corrupt("gaussian_blur", 5, batch), expected, atol=1e-5)


def test_pixelate_averages_areas():
    column = np.arange(5, dtype=np.float32) / 10
    image = np.tile(column[None, :, None, None], (1, 1, 5, 1))
    # floor(0.65 * 5) = 3 pixels of 5/3 each: (0 + 2/3 * 1) / (5/3), (1/3 + 2 + 3/3) / (5/3), ...
    means = np.array([0.4, 2.0, 3.6]) / 10
    np.testing.assert_allclose(
        corrupt("pixelate", 5, image)[0, :, 0, 0], means[[0, 0, 1, 2, 2]], rtol=1e-5
    )


def test_rotation_is_scipys_one_way_or_the_other():
    batch = images(count=6, size=(11, 11), channels=1)
    rotated = corrupt("rotation", 5, batch)
    ways = set()
    for before, after in zip(batch, rotated, strict=True):
        errors = {}
        for sign in (1, -1):
            turned = ndimage.rotate(before[..., 0], sign * 30, reshape=False, order=1)
            errors[sign] = np.abs(after[1:-1, 1:-1, 0] - turned[1:-1, 1:-1]).mean()
        way = min(errors, key=errors.get)
        assert errors[way] < 0.02 < errors[-way]
        ways.add(way)
    assert ways == {1, -1}


def test_translation_moves_the_centre_of_mass_by_its_length_in_any_direction():
    batch = np.zeros((30, 21, 21, 1), np.float32)
    batch[:, 10, 10] = 1
    moved = corrupt("translation", 4, batch)[..., 0]
    shifts = np.array([ndimage.center_of_mass(image) for image in moved]) - 10
    np.testing.assert_allclose(np.linalg.norm(shifts, axis=1), 0.2 * 21, rtol=1e-3)
    assert set(map(tuple, np.sign(shifts).astype(int))) == {(1, 1), (1, -1), (-1, 1), (-1, -1)}


def test_occlusion_blackens_one_square_inside_the_image():
    white = np.ones((20, 10, 14, 2), np.float32)
    hidden = corrupt("occlusion", 3, white) == 0
    assert np.array_equal(hidden[..., 0], hidden[..., 1])
    for mask in hidden[..., 0]:
        rows, columns = np.nonzero(mask)
        assert len(rows) == 16 and np.ptp(rows) == np.ptp(columns) == 3
    assert len({tuple(np.argwhere(mask)[0]) for mask in hidden[..., 0]}) > 5


@pytest.mark.parametrize(
    ("name", "severity", "batch", "message"),
    [
        ("fog", 1, images(), "name must be one of brightness, .*, translation, got 'fog'"),
        ("contrast", 0, images(), "severity must be a whole number in 1..5, got 0"),
        ("contrast", 6, images(), "severity must be a whole number in 1..5, got 6"),
        ("rotation", 1, images()[0], r"images must be a non-empty \[B, H, W, ch\], got shape"),
        ("contrast", 1, images()[:0], r"images must be a non-empty \[B, H, W, ch\], got shape"),
        ("contrast", 1, images().astype(np.int32), "images must be uint8 or floating, got int32"),
        ("contrast", 1, images() - 0.5, r"floating images must be in \[0, 1\], got -0\.5 to"),
        ("contrast", 1, images() * np.nan, r"floating images must be in \[0, 1\], got nan to nan"),
    ],
)
def test_bad_arguments_are_refused(name, severity, batch, message):
    with pytest.raises(ValueError, match=message):
        corrupt(name, severity, batch)


def test_positions_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="positions must be one for each of 3 images, got shape"):
        corrupt("contrast", 1, images(), np.arange(2))


def test_bfloat16_images_stay_bfloat16():
    batch = jnp.asarray(images(), jnp.bfloat16)
    assert corruptions.create("rotation", 1)(KEY, batch, np.arange(3)).dtype == jnp.bfloat16
