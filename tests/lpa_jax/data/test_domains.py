"""Domains: rotation, colouring, assignment, holdout, folders, and batches of several domains."""

import math
import shutil

import numpy as np
import PIL.Image
import pytest

from lpa_jax import data
from lpa_jax.data import domain_mnist
from lpa_jax.data.domain_folders import FOLDER_SETS
from tests.helpers.toy import assert_batches_equal


@pytest.fixture(scope="module")
def rotated(data_dir):
    return data.load_domains("RotatedMNIST", data_dir, seed=1)


@pytest.fixture(scope="module")
def colored(data_dir):
    return data.load_domains("ColoredMNIST", data_dir, seed=1)


def _pool(data_dir):
    parts = [data.load("mnist5k", split, data_dir) for split in ("train", "test")]
    return np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts])


def _slow_rotation(image, degrees):
    """Pixel centres turned back about the image's centre, then bilinear; edge pixels extend."""
    height, width = image.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    result = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            x, y = column + 0.5 - width / 2, row + 0.5 - height / 2
            # visually clockwise with y pointing down: where this pixel came from
            source_x = x * cos - y * sin + width / 2
            source_y = x * sin + y * cos + height / 2
            if not (0 <= source_x < width and 0 <= source_y < height):
                continue
            left, top = math.floor(source_x - 0.5), math.floor(source_y - 0.5)
            a, b = source_x - 0.5 - left, source_y - 0.5 - top

            def at(r, c):
                return float(image[min(max(r, 0), height - 1), min(max(c, 0), width - 1)])

            upper = (1 - a) * at(top, left) + a * at(top, left + 1)
            lower = (1 - a) * at(top + 1, left) + a * at(top + 1, left + 1)
            result[row, column] = (1 - b) * upper + b * lower
    return result


@pytest.mark.parametrize("degrees", [15, 75])
def test_rotation_equals_slow_bilinear_interpolation(degrees):
    image = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    rotated = domain_mnist.rotate(image[None, :, :, None], degrees)[0, :, :, 0]
    # Pillow computes in fixed point
    assert np.abs(rotated - _slow_rotation(image, degrees)).max() <= 1.0


def test_rotated_mnist_assigns_every_image_to_exactly_one_domain(rotated, data_dir):
    assert rotated.domain_names == ("0", "15", "30", "45", "60", "75")
    assert sorted(map(len, rotated.datasets)) == [833] * 4 + [834] * 2
    images, labels = _pool(data_dir)
    rows = {
        (angle, image.tobytes(), int(label))
        for angle, part in zip((0, 15, 30, 45, 60, 75), rotated.datasets, strict=True)
        for image, label in zip(part.images, part.labels, strict=True)
    }
    assert len(rows) == 5000  # mnist5k repeats no image
    home = np.zeros(5000, int)
    for angle in (0, 15, 30, 45, 60, 75):
        turned = domain_mnist.rotate(images, angle)
        home += [
            (angle, image.tobytes(), int(label)) in rows
            for image, label in zip(turned, labels, strict=True)
        ]
    np.testing.assert_array_equal(home, 1)


def test_domains_depend_on_the_seed_alone(rotated, data_dir):
    again = data.load_domains("RotatedMNIST", data_dir, seed=1)
    other = data.load_domains("RotatedMNIST", data_dir, seed=2)
    for old, same, new in zip(rotated.datasets, again.datasets, other.datasets, strict=True):
        np.testing.assert_array_equal(old.images, same.images)
        assert not np.array_equal(old.labels, new.labels)


def test_colour_agrees_with_the_label_as_often_as_the_domain_says(colored):
    assert colored.domain_names == ("+90%", "+80%", "-90%")
    assert colored.num_classes == 2
    for part, agreement in zip(colored.datasets, (0.9, 0.8, 0.1), strict=True):
        assert part.image_shape == (28, 28, 2)
        ink = part.images.sum((1, 2), dtype=np.int64)
        assert ((ink > 0).sum(axis=1) == 1).all()  # the other channel is empty
        colours = ink.argmax(axis=1)
        # 1667 tosses: four standard errors are at most 0.04
        assert np.mean(colours == part.labels) == pytest.approx(agreement, abs=0.04)


def test_a_quarter_of_the_coloured_labels_are_flipped_independently_of_the_colour(
    colored, data_dir
):
    images, digits = _pool(data_dir)
    digit_of = {image.tobytes(): digit for image, digit in zip(images, digits, strict=True)}
    for part, agreement in zip(colored.datasets, (0.9, 0.8, 0.1), strict=True):
        grey = part.images.max(axis=-1, keepdims=True)
        small = np.array([digit_of[image.tobytes()] for image in grey]) < 5
        flipped = part.labels != small
        assert np.mean(flipped) == pytest.approx(0.25, abs=0.045)
        agrees = part.images.sum((1, 2), dtype=np.int64).argmax(axis=1) == part.labels
        assert np.mean(agrees[flipped]) == pytest.approx(agreement, abs=0.08)


def test_colored_mnist_at_14_pixels_keeps_every_other_pixel(colored, data_dir):
    small = data.load_domains("ColoredMNIST", data_dir, seed=1, image_size=14)
    for part, full in zip(small.datasets, colored.datasets, strict=True):
        np.testing.assert_array_equal(part.images, full.images[:, ::2, ::2])
        np.testing.assert_array_equal(part.labels, full.labels)


def test_holdout_splits_partition_by_seed_and_domain():
    splits = {(s, d): data.holdout_split(103, 0.2, s, d) for s in (0, 1) for d in (0, 1)}
    for inside, outside in splits.values():
        assert len(outside) == 20  # floor(20.6)
        np.testing.assert_array_equal(np.sort(np.concatenate([inside, outside])), np.arange(103))
    assert len({outside.tobytes() for _, outside in splits.values()}) == 4
    np.testing.assert_array_equal(data.holdout_split(103, 0.2, 1, 1)[1], splits[1, 1][1])


def _toys(sizes=(5, 8, 3)):
    toys = []
    for d, size in enumerate(sizes):
        images = np.zeros((size, 2, 2, 1), np.uint8)
        images[:, 0, 0, 0] = np.arange(size) + 50 * d  # pixel 0 tells domain and example
        toys.append(data.Dataset(f"toy{d}", images, np.arange(size) % 3, 3))
    return toys


def _rows(dataset):
    """The data set as a source that is read example by example."""
    return [
        {"image": image, "label": int(label)}
        for image, label in zip(dataset.images, dataset.labels, strict=True)
    ]


def test_a_domain_batch_has_equally_many_of_each_domain_wherever_it_is_cut():
    batch = data.domain_batches(_toys(), 0, 4)[7]
    pixels = batch["image"][:, 0, 0, 0]
    np.testing.assert_array_equal(batch["domain"], pixels // 50)
    np.testing.assert_array_equal(batch["label"], (pixels % 50) % 3)
    np.testing.assert_array_equal(batch["position"], np.arange(12))
    for shards in (1, 2, 4):
        for shard in np.split(batch["domain"], shards):
            np.testing.assert_array_equal(np.bincount(shard), [4 // shards] * 3)


def test_every_example_occurs_once_in_each_epoch_of_its_domain():
    train = data.domain_batches(_toys(), 0, 2)
    seen = np.concatenate([train[step]["image"][:, 0, 0, 0] for step in range(60)])
    orders = set()
    for d, size in enumerate((5, 8, 3)):
        stream = seen[seen // 50 == d] - 50 * d
        assert len(stream) == 120
        epochs = stream.reshape(-1, size)
        expected = np.tile(np.arange(size), (len(epochs), 1))
        np.testing.assert_array_equal(np.sort(epochs), expected)
        orders.add(tuple(stream[stream < 3][:9]))
    assert len(orders) == 3  # the streams are independent
    assert train.steps_per_epoch == 2  # three examples, two at a time


def test_domain_batches_depend_on_seed_and_step_only():
    train = data.domain_batches(_toys(), 3, 4)
    forwards = [train[step] for step in range(9)]
    for step in (8, 0, 5, 5):
        assert_batches_equal(data.domain_batches(_toys(), 3, 4)[step], forwards[step])
    other = data.domain_batches(_toys(), 4, 4)
    assert any((other[s]["image"] != forwards[s]["image"]).any() for s in range(9))


def test_host_slices_of_domain_batches_concatenate_to_the_global_batch():
    whole = data.domain_batches(_toys(), 1, 4)
    parts = [data.domain_batches(_toys(), 1, 4, host_slice=(host, 2)) for host in range(2)]
    for step in (0, 5):
        joined = {key: np.concatenate([part[step][key] for part in parts]) for key in whole[step]}
        assert_batches_equal(joined, whole[step])


def test_sources_that_are_read_by_example_give_the_same_domain_batches():
    streamed = data.domain_batches([_rows(toy) for toy in _toys()], 1, 4)
    for step in (0, 5):
        assert_batches_equal(streamed[step], data.domain_batches(_toys(), 1, 4)[step])


# DomainBed's folders


@pytest.fixture
def folders(tmp_path):
    """PACS in small: one image a class, two of the first class; pixel values tell them apart."""
    for d, domain in enumerate(("art_painting", "cartoon", "photo", "sketch")):
        for label, name in enumerate(_PACS_CLASSES):
            place = tmp_path / "PACS" / domain / name
            place.mkdir(parents=True)
            for i in range(2 if label == 0 else 1):
                value = 60 * d + 5 * label + i
                path = place / f"{i}{'.JPG' if label % 2 else '.png'}"
                PIL.Image.new("RGB", (6 + label, 9), (value,) * 3).save(path)
    (tmp_path / "PACS" / "readme.txt").write_text("beside the domains")
    (tmp_path / "PACS" / "photo" / "dog" / ".DS_Store").write_text("a file manager's")
    return tmp_path


_PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


def test_folders_become_domains_with_classes_in_alphabetical_order(folders):
    pacs = data.load_domains("PACS", folders, image_size=4)
    assert pacs.domain_names == ("art_painting", "cartoon", "photo", "sketch")
    assert pacs.num_classes == 7
    for d, domain in enumerate(pacs.datasets):
        assert domain.name == f"PACS/{pacs.domain_names[d]}"
        assert domain.class_names == _PACS_CLASSES
        np.testing.assert_array_equal(domain.counts, [2, 1, 1, 1, 1, 1, 1])
        toy = data.in_memory(domain)
        assert toy.image_shape == (4, 4, 3)
        expected = 60 * d + 5 * toy.labels + np.array([0, 1, 0, 0, 0, 0, 0, 0])
        # JPEG is not exact
        assert np.abs(toy.images.astype(int) - expected[:, None, None, None]).max() <= 2


# As DomainBed's download script leaves them: folder, domains in its order, number of classes.
DOMAINBED = {
    "VLCS": ("VLCS", "Caltech101 LabelMe SUN09 VOC2007", 5),
    "PACS": ("PACS", "art_painting cartoon photo sketch", 7),
    "OfficeHome": ("office_home", "Art Clipart Product Real_World", 65),
    "TerraIncognita": ("terra_incognita", "location_100 location_38 location_43 location_46", 10),
    "DomainNet": ("domain_net", "clipart infograph painting quickdraw real sketch", 345),
    "SVIRO": ("sviro", "aclass escape hilux i3 lexus tesla tiguan tucson x5 zoe", 7),
}


@pytest.mark.parametrize("name", DOMAINBED)
def test_every_set_of_domainbed_is_read_from_the_folders_that_it_leaves(tmp_path, name):
    folder, listed, classes = DOMAINBED[name]
    domains = [domain.replace("_World", " World") for domain in listed.split()]
    PIL.Image.new("RGB", (2, 2)).save(tmp_path / "image.png")
    for domain in domains:
        for label in range(classes):
            place = tmp_path / folder / domain / f"class {label:03d}"
            place.mkdir(parents=True)
            (place / "a.png").hardlink_to(tmp_path / "image.png")
    found = data.load_domains(name, tmp_path, image_size=4)
    assert list(found.domain_names) == domains and found.num_classes == classes
    assert all(list(domain.labels) == list(range(classes)) for domain in found.datasets)
    assert set(DOMAINBED) == set(FOLDER_SETS)


def test_domain_batches_of_folders_equal_those_in_memory_ahead_or_not(folders):
    files = data.load_domains("PACS", folders, image_size=4).datasets
    split = [data.holdout_split(len(part), 0.25, 0, d)[0] for d, part in enumerate(files)]
    files = [part.subset(kept) for part, kept in zip(files, split, strict=True)]
    in_memory = data.domain_batches([data.in_memory(part) for part in files], 0, 2)
    read = data.domain_batches(files, 0, 2)
    ahead = data.read_ahead(read)
    for step in (3, 4, 0):
        assert_batches_equal(read[step], in_memory[step])
        assert_batches_equal(ahead[step], in_memory[step])
    assert ahead.steps_per_epoch == 3


def _remove(place):
    shutil.rmtree(place)


def _empty(place):
    for file in place.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: _remove(root), "no folder '.*/PACS'"),
        (lambda root: _remove(root / "cartoon"), "no domain folder '.*/PACS/cartoon'"),
        (lambda root: (root / "extra").mkdir(), "'.*/PACS/extra' is none of its domains art_pai"),
        (lambda root: _remove(root / "photo/horse"),
         "domain '.*/PACS/photo' lacks class 'horse', which other domains have"),
        (lambda root: _empty(root / "photo/horse"), "class folder '.*/photo/horse' is empty"),
        (lambda root: [_remove(domain / "house") for domain in root.glob("*/")],
         "'.*/PACS' has 6 classes, must have 7"),
        (lambda root: (root / "photo/horse/notes.txt").write_text(""),
         r"'.*/photo/horse/notes\.txt' is no image file"),
        (lambda root: (root / "photo/horse/more").mkdir(), "'.*/horse/more' is no image file"),
        (lambda root: (root / "photo/stray.png").write_bytes(b""),
         r"'.*/photo/stray\.png' must be in a class folder, got it beside"),
        (lambda root: (root / "photo/horse/a.png").symlink_to("/etc/passwd"),
         r"image 'photo/horse/a\.png': leads through a link out of"),
    ],
)  # fmt: skip
def test_folders_that_are_not_as_they_should_be_get_one_line(folders, spoil, message):
    spoil(folders / "PACS")
    with pytest.raises(ValueError, match=message) as caught:
        data.load_domains("PACS", folders, image_size=4)
    assert "\n" not in str(caught.value)


def test_a_broken_image_of_a_domain_is_named_when_it_is_read(folders):
    (folders / "PACS/sketch/house/0.JPG").write_bytes(b"cut")
    sketch = data.load_domains("PACS", folders, image_size=4).datasets[3]
    with pytest.raises(ValueError, match=r"sketch/house/0\.JPG': cannot be decoded"):
        data.in_memory(sketch)


_TOY = _toys()[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.load_domains("rotated"),
         "dataset must be one of RotatedMNIST, ColoredMNIST, .*got 'rotated'"),
        (lambda: data.load_domains("PACS"),
         "data_dir must be the folder that holds PACS/, got None"),
        (lambda: data.load_domains("RotatedMNIST", image_size=14),
         "image_size must be 28 for RotatedMNIST, got 14"),
        (lambda: data.load_domains("ColoredMNIST", image_size=32),
         "image_size must be 28 or 14 for ColoredMNIST, got 32"),
        (lambda: data.Domains("one", ("a",), (_TOY,), 3),
         "data set 'one' must have at least 2 domains, got 1"),
        (lambda: data.Domains("x", ("a", "b"), (_TOY,), 3),
         "datasets of 'x' must be one for each of 2 domain names, got 1"),
        (lambda: data.Domains("x", ("a", "b"), (_TOY,) * 2, 4),
         "domain 'a' of 'x' must have 4 classes, got 3"),
        (lambda: data.holdout_split(0, 0.2, 0), "num_examples must be a whole number >= 1, got 0"),
        (lambda: data.holdout_split(10, 1.0, 0), r"fraction must be in \(0, 1\), got 1\.0"),
        (lambda: data.holdout_split(4, 0.2, 0),
         r"fraction must hold out one of 4 examples at least, got 0\.2"),
        (lambda: data.domain_batches([], 0, 4), "datasets must hold at least one domain, got none"),
        (lambda: data.domain_batches(_toys(), 0, 0),
         "batch_size_per_domain must be a whole number >= 1, got 0"),
        (lambda: data.domain_batches(_toys(), 0, 3, host_slice=(0, 2)),
         "batch_size must be a multiple of the 2 hosts, got 3"),
        (lambda: data.domain_batches(_toys(), 0, 4)[-1],
         "step must be a whole number >= 0, got -1"),
    ],
)  # fmt: skip
def test_bad_arguments_get_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
