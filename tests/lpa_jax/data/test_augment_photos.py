"""Resized crops and changes of colour, against Pillow, colorsys and slow NumPy loops."""

import colorsys
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest

from lpa_jax.data import augment
from lpa_jax.data.augment import color, resized_crop

SHAPE = (6, 12, 9, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)
POSITIONS = np.arange(len(IMAGES))
RNG = jax.random.key(0)
PHOTOS = "resized_crop+flip+jitter+grayscale"
STRONG = {"jitter": (0.3, 0.3, 0.3, 0.3), "grayscale_probability": 0.5, "scale": (0.3, 1.0)}


def _run(function, images=IMAGES, positions=POSITIONS, rng=RNG):
    return np.asarray(jax.jit(function)(rng, jnp.asarray(images), jnp.asarray(positions)))


def _keys(number):
    return jax.random.split(RNG, number)


# Resized crops: (top, left, height, width) inside 12 x 9 pixels.
BOXES = np.array(
    [(0, 0, 12, 9), (0, 0, 1, 1), (11, 8, 1, 1), (3, 2, 5, 7), (2, 0, 10, 4), (0, 4, 6, 5)]
)


def _slow_resize(image, box):
    """Bilinear, pixel by pixel; pixels of the box at its edge extend."""
    top, left, height, width = box
    part = image[top : top + height, left : left + width].astype(np.float64)
    result = np.zeros(image.shape)
    for row, column in np.ndindex(image.shape[:2]):
        y = min(max((row + 0.5) * height / len(image) - 0.5, 0), height - 1)
        x = min(max((column + 0.5) * width / image.shape[1] - 0.5, 0), width - 1)
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
        upper = (1 - (x - x0)) * part[y0, x0] + (x - x0) * part[y0, x1]
        lower = (1 - (x - x0)) * part[y1, x0] + (x - x0) * part[y1, x1]
        result[row, column] = (1 - (y - y0)) * upper + (y - y0) * lower
    return result


def test_a_box_is_resized_as_a_slow_loop_and_as_pillow_do():
    boxes = resized_crop.Boxes(*jnp.asarray(BOXES.T))
    resize = jax.jit(resized_crop.resize_boxes)
    resized = np.asarray(resize(jnp.asarray(IMAGES, jnp.float32), boxes))
    rounded = np.asarray(resize(jnp.asarray(IMAGES), boxes))
    for number, (image, (top, left, height, width)) in enumerate(zip(IMAGES, BOXES, strict=True)):
        np.testing.assert_allclose(
            resized[number], _slow_resize(image, BOXES[number]), rtol=1e-5, atol=1e-3
        )
        part = PIL.Image.fromarray(image).crop((left, top, left + width, top + height))
        pillow = np.asarray(part.resize((9, 12), PIL.Image.Resampling.BILINEAR), np.int32)
        # Pillow rounds after each of the two directions
        assert np.abs(rounded[number] - pillow).max() <= 1
    np.testing.assert_array_equal(rounded[0], IMAGES[0])


def test_boxes_lie_inside_with_the_area_and_the_proportions_asked_for():
    height, width, scale, ratio = 200, 300, (0.2, 0.6), (0.5, 1.5)
    draw = jax.jit(lambda keys: resized_crop.draw_boxes(keys, height, width, scale, ratio))
    boxes = np.stack(draw(_keys(4000)), axis=1)
    top, left, heights, widths = boxes.T
    assert boxes.min() >= 0
    assert (top + heights <= height).all() and (left + widths <= width).all()
    share, proportion = heights * widths / (height * width), widths / heights
    # whole pixels: half a pixel more or less on each side
    assert share.min() > 0.2 - 0.01 and share.max() < 0.6 + 0.01
    assert proportion.min() > 0.5 * 0.98 and proportion.max() < 1.5 * 1.02
    assert share.min() < 0.21 and proportion.max() > 1.45
    # Those that fit: low areas more often, as high and narrow boxes do not.
    for corner, room in ((top, height - heights), (left, width - widths)):
        free = room > 20
        assert np.mean(corner[free] / room[free]) == pytest.approx(0.5, abs=0.03)
        assert (corner == 0).any() and (corner == room).any()


def test_areas_are_uniform_and_proportions_uniform_in_the_logarithm():
    # Every draw fits: none of them is lost
    draw = jax.jit(lambda keys: resized_crop.draw_boxes(keys, 400, 400, (0.1, 0.5), (0.5, 2.0)))
    boxes = draw(_keys(4000))
    share = np.asarray(boxes.height * boxes.width) / 400**2
    logarithm = np.log(np.asarray(boxes.width) / np.asarray(boxes.height)) / np.log(2)
    for values, low, high in ((share, 0.1, 0.5), (logarithm, -1, 1)):
        counts, _ = np.histogram(values, bins=4, range=(low, high))
        assert np.abs(counts / 4000 - 0.25).max() < 0.035  # five standard deviations


def test_where_no_box_fits_the_largest_central_one_is_taken():
    for ratio, expected in (((3.0, 4.0), (4, 0, 4, 12)), ((0.2, 0.25), (0, 4, 12, 3))):

        @jax.jit
        def draw(keys, ratio=ratio):
            return resized_crop.draw_boxes(keys, 12, 12, (1.0, 1.0), ratio)

        np.testing.assert_array_equal(np.stack(draw(_keys(3)), axis=1), [expected] * 3)


def test_the_whole_square_image_at_ratio_one_is_the_identity():
    square = IMAGES[:, :9]
    same = augment.random_resized_crop(scale=(1, 1), ratio=(1, 1))
    np.testing.assert_array_equal(_run(same, square), square)
    noise = np.random.default_rng(1).normal(size=square.shape).astype(np.float32)
    np.testing.assert_array_equal(_run(same, noise), noise)


def _grey(image):
    return (image @ np.array([0.299, 0.587, 0.114]))[..., None]


def _slow_turn(image, turn):
    result = np.empty_like(image)
    for place in np.ndindex(image.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[place])
        result[place] = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
    return result


def _slow_jitter(image, factors, order, turn, place):
    """One change after the other, in float64, as the definitions say."""
    image = image.astype(np.float64) / 255
    changes = list(order)
    changes.insert(place, "hue")
    for change in changes:
        if change == "hue":
            image = _slow_turn(image, turn)
            continue
        towards = (0.0, _grey(image).mean(), _grey(image))[change]
        image = np.clip(factors[change] * image + (1 - factors[change]) * towards, 0, 1)
    return image


def test_jitter_equals_its_definition_in_every_order():
    orders = list(itertools.product(itertools.permutations(range(3)), range(4)))
    generator = np.random.default_rng(2)
    image = IMAGES[0, :4, :4].copy()
    image[0, 0] = image[0, 0, 0]  # grey, without a hue
    image[0, 1] = (200, 200, 10)  # two channels are the highest
    jitters = color.Jitter(
        factors=generator.uniform(0.2, 1.8, (24, 3)).astype(np.float32),
        order=np.array([order for order, _ in orders]),
        turn=generator.uniform(-0.5, 0.5, 24).astype(np.float32),
        place=np.array([place for _, place in orders]),
    )
    images = np.repeat(image[None] / 255, 24, axis=0).astype(np.float32)
    results = np.asarray(jax.jit(color.jitter_colors)(images, jitters))
    expected = [_slow_jitter(image, *jitter) for jitter in zip(*jitters, strict=True)]
    np.testing.assert_allclose(results, expected, atol=2e-5)
    without = np.asarray(
        jax.jit(lambda *of: color.jitter_colors(*of, turns=False))(images, jitters)
    )
    unturned = [_slow_jitter(image, f, o, 0.0, p) for f, o, _, p in zip(*jitters, strict=True)]
    np.testing.assert_allclose(without, unturned, atol=2e-5)


ENHANCERS = (PIL.ImageEnhance.Brightness, PIL.ImageEnhance.Contrast, PIL.ImageEnhance.Color)


@pytest.mark.parametrize("which", range(3))
def test_brightness_contrast_and_saturation_are_those_of_pillow(which):
    factors = np.ones((len(IMAGES), 3), np.float32)
    factors[:, which] = (0.0, 0.4, 0.9, 1.0, 1.3, 2.0)
    jitters = color.Jitter(factors, np.tile(np.arange(3), (6, 1)), np.zeros(6), np.zeros(6, int))
    changed = np.asarray(jax.jit(color.jitter_colors)(IMAGES / np.float32(255), jitters)) * 255
    for image, result, factor in zip(IMAGES, changed, factors[:, which], strict=True):
        pillow = np.asarray(
            ENHANCERS[which](PIL.Image.fromarray(image)).enhance(float(factor)), np.float64
        )
        # Pillow cuts digits off; the mean and the grey values that it blends with are whole numbers
        assert np.abs(result - pillow).max() <= 1.5
        assert factor == 1 or np.abs(result - image).max() > 5


def test_factors_orders_and_turns_are_drawn_evenly():
    strengths = (0.3, 2.0, 0.0)
    draw = jax.jit(lambda keys: color.draw_jitters(keys, strengths, 0.2))
    factors, order, turn, place = (np.asarray(part) for part in draw(_keys(4800)))
    for values, low, high in (
        (factors[:, 0], 0.7, 1.3),
        (factors[:, 1], 0.0, 3.0),
        (turn, -0.2, 0.2),
    ):
        assert values.min() >= low and values.max() <= high
        counts, _ = np.histogram(values, bins=4, range=(low, high))
        assert np.abs(counts / 4800 - 0.25).max() < 0.032  # five standard deviations
    np.testing.assert_array_equal(factors[:, 2], 1)
    _, counts = np.unique(np.column_stack([order, place]), axis=0, return_counts=True)
    assert len(counts) == 24 and counts.min() > 130 and counts.max() < 270  # 200 each
    correlations = np.corrcoef(np.column_stack([factors[:, :2], turn, place]), rowvar=False)
    assert np.abs(correlations - np.eye(4)).max() < 0.08


@pytest.mark.parametrize("strengths", [(0.4, 0.4, 0.4, 0.0), (0.0, 0.0, 0.0, 0.3)])
def test_color_jitter_applies_what_is_drawn_for_the_position(strengths):
    @jax.jit
    def expected(rng, images, positions):
        keys = jax.vmap(lambda position: jax.random.fold_in(rng, position))(positions)
        jitters = color.draw_jitters(keys, strengths[:3], strengths[3])
        return jnp.round(255 * color.jitter_colors(images / 255.0, jitters))

    result = _run(augment.color_jitter(*strengths))
    np.testing.assert_array_equal(result, expected(RNG, IMAGES, POSITIONS))
    assert (result != IMAGES).any((1, 2, 3)).all()


def test_grey_images_have_no_saturation_and_no_hue_to_change():
    grey = IMAGES[..., :1]
    np.testing.assert_array_equal(_run(augment.color_jitter(0, 0, 0.9, 0.5), grey), grey)
    np.testing.assert_array_equal(_run(augment.grayscale(1.0), grey), grey)
    brighter = _run(augment.color_jitter(0.9, 0, 0.9, 0.5), grey)
    assert (brighter != grey).any((1, 2, 3)).all()


def test_grayscale_is_the_luma_of_pillow_in_all_channels():
    result = _run(augment.grayscale(1.0))
    for image, grey in zip(IMAGES, result, strict=True):
        luma = np.asarray(PIL.Image.fromarray(image).convert("L"), np.int32)
        assert np.abs(grey - luma[..., None]).max() <= 1
        assert (grey == grey[..., :1]).all()


def test_grayscale_changes_the_share_of_images_that_is_asked_for():
    images = np.tile(np.uint8([[[[200, 10, 90]]]]), (2000, 1, 1, 1))
    changed = (_run(augment.grayscale(0.1), images, np.arange(2000)) != images).any((1, 2, 3))
    assert changed.mean() == pytest.approx(0.1, abs=0.035)  # five standard deviations


@pytest.mark.parametrize(
    "identity", [augment.color_jitter(0, 0, 0, 0), augment.grayscale(0.0)], ids=["jitter", "grey"]
)
def test_strengths_and_probabilities_of_zero_change_nothing(identity):
    np.testing.assert_array_equal(_run(identity), IMAGES)


def test_photo_augmentation_does_not_depend_on_how_the_batch_is_spread():
    function = jax.jit(augment.create(PHOTOS, **STRONG))
    whole = np.asarray(function(RNG, IMAGES, POSITIONS))
    elsewhere = np.array([4, 1, 5, 0, 3, 2])
    moved = function(RNG, IMAGES[elsewhere], POSITIONS[elsewhere])
    np.testing.assert_array_equal(moved, whole[elsewhere])
    assert not np.array_equal(function(RNG, IMAGES, POSITIONS[elsewhere]), whole)
    assert not np.array_equal(function(jax.random.key(1), IMAGES, POSITIONS), whole)


@pytest.mark.parametrize("dtype", [np.uint8, jnp.bfloat16])
def test_photo_augmentation_keeps_shape_dtype_and_range(dtype):
    scale = 1 if dtype == np.uint8 else 255
    result = _run(augment.create(PHOTOS, **STRONG), (IMAGES / scale).astype(dtype))
    assert (result.shape, result.dtype) == (SHAPE, dtype)
    low, high = result.astype(np.float32).min(), result.astype(np.float32).max()
    assert low >= 0 and 150 / scale < high <= 255 / scale


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: augment.random_resized_crop((0.0, 1.0)),
         r"scale must be two numbers, 0 < low <= high <= 1, got \(0\.0, 1\.0\)"),
        (lambda: augment.random_resized_crop((0.5, 0.2)),
         r"scale must be two numbers, 0 < low <= high <= 1, got \(0\.5, 0\.2\)"),
        (lambda: augment.random_resized_crop((0.5, 1.1)),
         r"scale must be two numbers, 0 < low <= high <= 1, got \(0\.5, 1\.1\)$"),
        (lambda: augment.random_resized_crop((0.5,)),
         r"scale must be two numbers, 0 < low <= high <= 1, got \(0\.5,\)"),
        (lambda: augment.random_resized_crop(ratio=(2, 1)),
         r"ratio must be two numbers, 0 < low <= high, got \(2, 1\)"),
        (lambda: augment.random_resized_crop(ratio=(1, np.inf)),
         r"ratio must be two numbers, 0 < low <= high, got \(1, inf\)"),
        (lambda: augment.color_jitter(-0.1), r"brightness must be finite and >= 0, got -0\.1"),
        (lambda: augment.color_jitter(contrast=np.nan),
         "contrast must be finite and >= 0, got nan"),
        (lambda: augment.color_jitter(hue=0.6), r"hue must be in \[0, 0\.5\], got 0\.6"),
        (lambda: augment.grayscale(1.5), r"probability must be in \[0, 1\], got 1\.5"),
        (lambda: _run(augment.color_jitter(), IMAGES[..., :2]),
         "images must have 1 or 3 channels to change their colours, got 2"),
        (lambda: _run(augment.grayscale(), IMAGES[..., :2]),
         "images must have 1 or 3 channels to change their colours, got 2"),
        (lambda: _run(augment.color_jitter(), IMAGES[0]),
         r"images must be \[B, H, W, ch\], got shape \(12, 9, 3\)"),
        (lambda: _run(augment.random_resized_crop(), positions=POSITIONS[:2]),
         r"positions must be one for each of 6 images, got shape \(2,\)"),
    ],
)  # fmt: skip
def test_bad_photo_augmentations_get_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
