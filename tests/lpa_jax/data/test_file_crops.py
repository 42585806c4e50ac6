"""Files that are cropped at their own size while they are decoded, by what their position draws."""

import math

import jax
import numpy as np
import PIL.Image
import pytest

from experiments.domains.data import DomainSource
from experiments.domains.settings import DomainSettings
from experiments.images.data import TaskSource
from experiments.images.settings import Settings
from lpa_jax import data
from lpa_jax.data import image_files
from lpa_jax.data.augment.resized_crop import DRAWS
from lpa_jax.data.example_stream import ExampleStream

SIZES = ((40, 30), (24, 60), (50, 50), (31, 17), (64, 16))
CROP = data.FileCrop(scale=(0.3, 0.6))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A domain of VLCS, five classes of one image each, which a list names, too."""
    root = tmp_path_factory.mktemp("files")
    generator = np.random.default_rng(0)
    rows = []
    for domain in ("Caltech101", "LabelMe", "SUN09", "VOC2007"):
        for label, name in enumerate(("bird", "car", "chair", "dog", "person")):
            path = root / "VLCS" / domain / name / "1.png"
            path.parent.mkdir(parents=True)
            width, height = SIZES[label]
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(path)
            rows.append(f"{domain}/{name}/1.png {label}\n")
    (root / "train.txt").write_text("".join(rows))
    return root


@pytest.fixture(scope="module")
def files(tree):
    return data.read_list(tree / "train.txt", tree / "VLCS", image_size=8)


def _slow_box(crop, width, height, draws):
    """Attempt after attempt, as the definition says it."""
    attempts = (DRAWS - 2) // 2
    for attempt in range(attempts):
        low, high = crop.scale
        area = (low + (high - low) * draws[attempt]) * width * height
        low, high = (math.log(bound) for bound in crop.ratio)
        ratio = math.exp(low + (high - low) * draws[attempts + attempt])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = math.floor(draws[-2] * (height - h + 1))
            left = math.floor(draws[-1] * (width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < crop.ratio[0]:
        h = round(width / crop.ratio[0])
    elif width / height > crop.ratio[1]:
        w = round(height * crop.ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@pytest.mark.parametrize("crop", [data.FileCrop(), CROP, data.FileCrop((1, 1), (0.7, 0.8))])
def test_a_box_is_that_of_a_slow_loop_and_lies_inside(crop):
    generator = np.random.default_rng(0)
    boxes = []
    for _ in range(200):
        width, height = generator.integers(8, 80, 2).tolist()
        draws = generator.random(DRAWS)
        left, top, right, bottom = box = crop.box(width, height, draws)
        assert box == _slow_box(crop, width, height, draws)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        boxes.append(box)
    assert len(set(boxes)) > 150


def _expected(files, seed, start, count, key=()):
    stream = ExampleStream(len(files), seed, key=key)
    images = []
    for index, draws in zip(
        stream.indices(start, count), stream.crop_draws(start, count), strict=True
    ):
        with PIL.Image.open(f"{files.root}/{files.paths[index]}") as image:
            part = image.crop(CROP.box(*image.size, draws))
        images.append(part.resize((8, 8), PIL.Image.Resampling.BILINEAR))
    return np.stack(images)


def test_training_batches_are_cropped_by_position_on_every_host_and_in_any_order(files):
    cropped = files.cropped(CROP)
    batches = data.batches(cropped, seed=3, batch_size=6)
    second = batches[1]["image"]
    np.testing.assert_array_equal(second, _expected(files, 3, 6, 6))
    np.testing.assert_array_equal(batches[0]["image"], _expected(files, 3, 0, 6))
    parts = [
        data.batches(cropped, seed=3, batch_size=6, host_slice=(host, 2))[1] for host in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate([part["image"] for part in parts]), second)
    np.testing.assert_array_equal(data.grain_batches(cropped, 3, 6)[1]["image"], second)
    domains = data.domain_batches([files, cropped], seed=3, batch_size_per_domain=4)[2]
    np.testing.assert_array_equal(domains["image"][1::2], _expected(files, 3, 8, 4, key=(1,)))
    whole = data.domain_batches([files, files], seed=3, batch_size_per_domain=4)[2]
    np.testing.assert_array_equal(domains["image"][::2], whole["image"][::2])


def test_every_epoch_and_seed_crops_anew_and_evaluation_not_at_all(files):
    cropped = files.cropped(CROP).subset([2])
    crops = [data.batches(cropped, seed, 2)[step]["image"] for seed in (0, 1) for step in (0, 1)]
    assert len({image.tobytes() for batch in crops for image in batch}) == 8
    whole = image_files.decode(f"{files.root}/{files.paths[2]}", 8)
    np.testing.assert_array_equal(cropped[0]["image"], whole)
    np.testing.assert_array_equal(data.evaluation_batches(cropped, 1)[0]["image"][0], whole)


def test_both_protocols_crop_training_files_alone(tree):
    photos = {"augmentation": "file_crop+flip", "image_size": 8, "model": "small_cnn"}
    settings = DomainSettings(
        dataset="VLCS", data_dir=str(tree), crop_scale=(0.3, 0.6), **photos
    ).check()
    source = DomainSource(settings)
    inside, outside = source.splits(0)["LabelMe"]
    assert inside.random_crop == outside.random_crop == CROP and source.on_disk
    settings = Settings(
        train_list=str(tree / "train.txt"),
        image_root=str(tree / "VLCS"),
        profile="none",
        evaluate_on="validation",
        validation_fraction=0.5,
        **photos,
    ).check()
    assert TaskSource(settings).task(0).train.random_crop == data.FileCrop()
    images = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    on_device = settings.transform((8, 8, 3)), data.augment.create("flip")
    rng, positions = jax.random.key(0), np.arange(2)
    np.testing.assert_array_equal(*(augment(rng, images, positions) for augment in on_device))


@pytest.mark.parametrize(
    ("augmentation", "expected"),
    [
        ("file_crop", "--augmentation: file_crop crops image files before they are resized, and"),
        ("flip+file_crop", "--augmentation: 'flip+file_crop': file_crop must come first, and once"),
        ("file_crop+file_crop", "file_crop must come first, and once"),
    ],
)
def test_what_cannot_be_cropped_is_refused_before_anything_is_written(
    refusal, augmentation, expected
):
    flags = (f"--augmentation={augmentation}", "--dataset=digits")
    assert expected in refusal("long_tail", *flags)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"scale": (0.5, 1.5)},
            r"scale must be two numbers, 0 < low <= high <= 1, got \(0\.5, 1\.5\)",
        ),
        ({"ratio": (2, 1)}, r"ratio must be two numbers, 0 < low <= high, got \(2, 1\)"),
    ],
)
def test_bad_ranges_get_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        data.FileCrop(**options)
