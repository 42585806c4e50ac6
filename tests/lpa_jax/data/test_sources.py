"""Data sets: what a Dataset refuses, the packaged builders, and reading TFDS without TensorFlow."""

import dataclasses
import hashlib
import json
import logging
import pathlib
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from experiments.images.data import open_splits
from experiments.images.settings import Settings
from lpa_jax import data
from lpa_jax.data import builders, image_files, sources

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


def _digest(*arrays):
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def _pixels(shape=(6, 5, 3)):
    return np.random.default_rng(0).integers(0, 256, (7, *shape), dtype=np.uint8)


def _info_of(builder, keys=("image", "label"), **features):
    features = tfds.features.FeaturesDict(features)
    return tfds.core.DatasetInfo(builder=builder, features=features, supervised_keys=keys)


class LpaTestPng(tfds.core.GeneratorBasedBuilder):
    """Seven PNG images, as cifar10 and its like store them; PIL encodes them without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(6, 5, 3))
        label = tfds.features.ClassLabel(names=["cat", "dog"])
        return _info_of(self, id=tfds.features.Text(), image=image, label=label)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _images(self):
        return [PIL.Image.fromarray(pixels) for pixels in _pixels()]

    def _generate_examples(self):
        for i, image in enumerate(self._images()):
            yield i, {"id": str(i), "image": image, "label": i % 2}


class LpaTestRagged(LpaTestPng):
    """The same with one image turned on its side, and the label named first."""

    def _info(self):
        image = tfds.features.Image(shape=(None, None, 3))
        label = tfds.features.ClassLabel(num_classes=2)
        return _info_of(self, ("label", "image"), image=image, label=label)

    def _images(self):
        first, *others = super()._images()
        return [first.transpose(PIL.Image.Transpose.ROTATE_90), *others]

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "validation": self._generate_examples(start=1)}

    def _generate_examples(self, start=0):
        for i, image in enumerate(self._images()[start:]):
            yield i, {"image": image, "label": i % 2}


class LpaTestHidden(LpaTestPng):
    """A set whose test split has no labels."""

    DTYPE = np.uint8

    def _info(self):
        image = tfds.features.Tensor(shape=(2, 2, 1), dtype=self.DTYPE)
        return _info_of(self, image=image, label=tfds.features.ClassLabel(num_classes=2))

    def _split_generators(self, dl_manager):
        labelled = {split: self._generate_examples() for split in ("train", "validation")}
        return labelled | {"test": self._generate_examples(hidden=True)}

    def _generate_examples(self, hidden=False):
        for i in range(4):
            yield i, {"image": np.zeros((2, 2, 1), self.DTYPE), "label": -1 if hidden else i % 2}


class LpaTestDeep(LpaTestHidden):
    """A set of 16-bit images."""

    DTYPE = np.uint16


def _prepare_without_tensorflow(builder_class, folder):
    with sources._quiet_log(), sources._quiet_preparation():
        builder_class(data_dir=str(folder)).download_and_prepare(file_format="array_record")


def test_embedded_names_are_the_packaged_builders():
    assert set(data.EMBEDDED) == set(builders.BUILDERS)


def test_mnist5k_splits_are_balanced_disjoint_and_never_change(data_dir):
    train = data.load("mnist5k", "train", data_dir)
    test = data.load("mnist5k", "test", data_dir)
    np.testing.assert_array_equal(train.counts, np.full(10, 400))
    np.testing.assert_array_equal(test.counts, np.full(10, 100))
    assert train.image_shape == (28, 28, 1)
    assert train.images.max() == 255
    seen = {image.tobytes() for image in train.images} | {image.tobytes() for image in test.images}
    assert len(seen) == 5000  # all images of the source differ, so no image is in both splits
    # every published number hangs on this split: change it only with the builder's VERSION
    assert _digest(train.images, train.labels) == "492a61facc9699dc"
    assert _digest(test.images, test.labels) == "5d12fb34a0abb3b9"


@pytest.mark.slow
def test_two_processes_prepare_at_once_without_tensorflow_or_output(tmp_path):
    program = """
import hashlib, json, pathlib, sys, time
import sklearn.datasets
from lpa_jax import data
from lpa_jax.data import builders
folder = pathlib.Path(sys.argv[1])
(folder / sys.argv[2]).touch()
while not (folder / "go").exists():
    time.sleep(0.001)
sets = [data.load("digits", split, folder / "tfds") for split in ("train", "test")]
digest = hashlib.sha256(b"".join(s.images.tobytes() + s.labels.tobytes() for s in sets)).hexdigest()
print(json.dumps({"digest": digest[:16], "tensorflow": "tensorflow" in sys.modules}))
"""
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", program, str(tmp_path), f"ready{i}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    results = [(*worker.communicate(timeout=60), worker.returncode) for worker in workers]
    for output, errors, status in results:
        assert (status, errors) == (0, "")
        assert json.loads(output) == {"digest": "f032a7e1745b0d63", "tensorflow": False}
    assert [path.name for path in (tmp_path / "tfds" / "digits").iterdir()] == ["1.0.0"]


def test_losing_the_race_to_prepare_uses_the_winners_data(tmp_path, monkeypatch):
    generate = builders.Digits._split_generators
    monkeypatch.setattr(
        builders.Digits, "_arrays", lambda self: (_pixels((8, 8, 1))[:6], np.arange(6) % 2)
    )
    monkeypatch.setattr(builders.Digits, "TEST_PER_CLASS", 1)

    def overtaken(self, dl_manager):
        monkeypatch.setattr(builders.Digits, "_split_generators", generate)
        data.prepare("digits", tmp_path)
        return generate(self, dl_manager)

    monkeypatch.setattr(builders.Digits, "_split_generators", overtaken)
    assert len(data.load("digits", "train", tmp_path)) == 4
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_preparation_restores_progress_bars_and_log(tmp_path, monkeypatch):
    from tensorflow_datasets.core.utils import tqdm_utils

    def fail(self):
        raise RuntimeError("no such luck\nand more")

    monkeypatch.setattr(builders.Digits, "_arrays", fail)
    monkeypatch.setattr(tqdm_utils, "_active", True)
    before = (tqdm_utils._active, list(logging.getLogger("absl").filters), sys.stdout)
    with pytest.raises(RuntimeError, match=r"^dataset='digits': .*RuntimeError: no such luck\)$"):
        data.prepare("digits", tmp_path)
    assert before == (tqdm_utils._active, logging.getLogger("absl").filters, sys.stdout)
    assert not list((tmp_path / "digits").iterdir())


def test_png_sets_read_back_without_tensorflow(tmp_path):
    _prepare_without_tensorflow(LpaTestPng, tmp_path)
    loaded = data.load("lpa_test_png", "train", tmp_path)
    assert loaded.class_names == ("cat", "dog")
    expected = {(pixels.tobytes(), i % 2) for i, pixels in enumerate(_pixels())}
    found = zip(loaded.images, loaded.labels.tolist(), strict=True)
    assert {(image.tobytes(), label) for image, label in found} == expected
    # one random-access source, read in any order
    source = data.open_source("lpa_test_png", "train", tmp_path)
    np.testing.assert_array_equal(source[3]["image"], loaded.images[3])
    assert source[3]["label"] == loaded.labels[3]
    assert "tensorflow" not in sys.modules


def test_images_that_differ_in_size_are_fitted_to_the_one_given_and_refused_without(tmp_path):
    _prepare_without_tensorflow(LpaTestRagged, tmp_path)
    with pytest.raises(ValueError, match=r"shapes \(\d, \d, 3\) and \(\d, \d, 3\), give image_"):
        data.load("lpa_test_ragged", "train", tmp_path)
    source = data.open_source("lpa_test_ragged", "train", tmp_path)
    assert {source[i]["image"].shape for i in range(7)} == {(6, 5, 3), (5, 6, 3)}
    loaded = data.load("lpa_test_ragged", "train", tmp_path, image_size=4)
    assert loaded.images.shape == (7, 4, 4, 3) and loaded.images.dtype == np.uint8
    for i in range(7):
        path = tmp_path / f"{i}.png"
        PIL.Image.fromarray(source[i]["image"]).save(path)
        np.testing.assert_array_equal(loaded.images[i], image_files.decode(str(path), 4))


def test_a_set_without_a_test_split_is_evaluated_on_its_validation_split(tmp_path):
    _prepare_without_tensorflow(LpaTestRagged, tmp_path)
    assert data.split_names("lpa_test_ragged", tmp_path) == ("train", "validation")
    settings = Settings(dataset="lpa_test_ragged", data_dir=str(tmp_path), image_size=4)
    train, evaluation = open_splits(settings)
    assert train.images.shape == (7, 4, 4, 3) and evaluation.images.shape == (6, 4, 4, 3)
    assert open_splits(dataclasses.replace(settings, evaluate_on="validation"))[1] is None


def test_a_test_split_without_labels_is_not_evaluated_on(tmp_path):
    _prepare_without_tensorflow(LpaTestHidden, tmp_path)
    assert not data.has_labels("lpa_test_hidden", "test", tmp_path)
    _, evaluation = open_splits(Settings(dataset="lpa_test_hidden", data_dir=str(tmp_path)))
    assert sorted(evaluation.labels) == [0, 0, 1, 1]


def test_tfrecord_data_gets_a_readable_error(tmp_path):
    _prepare_without_tensorflow(LpaTestPng, tmp_path)
    info = tmp_path / "lpa_test_png" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"as tfrecord, which cannot be read without TensorFlow"):
        data.load("lpa_test_png", "train", tmp_path)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("nonesuch", "train", "dataset must be digits, mnist5k or a TFDS .*, got 'nonesuch'"),
        ("", "train", "dataset must be digits, .*, got ''"),
        (None, "train", "dataset must be digits, .*, got None"),
        ("a b", "train", "dataset='a b': refused by TFDS"),
        ("cifar10/nonesuch", "train", "dataset='cifar10/nonesuch': refused by TFDS"),
        ("imdb_reviews", "train", "dataset='imdb_reviews': not image classification"),
        ("voc", "train", "dataset='voc': not image classification"),
        ("cifar10", "train", r"not prepared in .*data\.prepare\('cifar10', data_dir="),
        ("mnist5k", "val", "split of mnist5k must be one of test, train, got 'val'"),
    ],
)
def test_bad_names_and_splits_get_one_line(name, split, message, data_dir):
    with pytest.raises(ValueError, match=message) as caught:
        data.load(name, split, data_dir)
    assert "\n" not in str(caught.value)


def test_preparing_without_tensorflow_says_what_to_install(tmp_path):
    if sources.importlib.util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is installed")
    with pytest.raises(RuntimeError, match="needs TensorFlow, run `pip install tensorflow-cpu`"):
        data.prepare("cifar10", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_as_data_dir_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^data_dir='.*file': cannot be written"):
        data.load("digits", "train", tmp_path / "file")


@pytest.mark.parametrize(
    ("place", "error", "name", "message"),
    [
        ("os.makedirs", PermissionError(13, "no"), "digits", r"data_dir='.*': cannot be written"),
        ("tensorflow_datasets.builder",
         ImportError("No module named importlib.readers", name="importlib.readers"), "cifar10",
         r"dataset='cifar10': needs a package that is missing or may not be read \(importlib\."),
        ("tensorflow_datasets.builder", PermissionError(13, "no"), "cifar10",
         r"data_dir='.*': cannot be read"),
    ],
)  # fmt: skip
def test_what_this_user_may_not_write_or_read_is_one_line(
    tmp_path, monkeypatch, place, error, name, message
):
    def refused(*_, **__):
        raise error

    monkeypatch.setattr(place, refused)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        data.load(name, "train", tmp_path / "tfds")
    assert "\n" not in str(caught.value)


def test_without_a_home_folder_data_dir_must_be_given(monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # no HOME, no passwd entry
    with pytest.raises(ValueError, match="data_dir must be given: neither HOME nor TFDS"):
        data.load("digits", "train")


IMAGES, LABELS = np.zeros((3, 4, 4, 1), np.uint8), np.array([0, 1, 1])
NAN = np.full((3, 4, 4, 1), np.nan, np.float32)


@pytest.mark.parametrize(
    ("images", "labels", "num_classes", "names", "message"),
    [
        (IMAGES.tolist(), LABELS, 2, None,
         "images must be a NumPy array of uint8 or float32, got list"),
        (IMAGES.astype(np.float64), LABELS, 2, None,
         "images must be a NumPy array of uint8 or float32, got float64"),
        (IMAGES[0], LABELS, 2, None,
         r"images must be a non-empty \[N, H, W, ch\], got shape \(4, 4, 1\)"),
        (IMAGES[:0], LABELS[:0], 2, None,
         r"images must be a non-empty \[N, H, W, ch\], got shape \(0, 4, 4, 1\)"),
        (NAN, LABELS, 2, None, "images must be finite, got nan or infinity"),
        (IMAGES, LABELS[:2], 2, None, "labels must be one for each of 3 images, got 2"),
        (IMAGES, LABELS, 1, None, r"labels must be in 0\.\.0, got 1 at position 1"),
        (IMAGES, LABELS - 1, 2, None, r"labels must be in 0\.\.1, got -1 at position 0"),
        (IMAGES, LABELS.astype(float), 2, None,
         r"labels must be a non-empty vector of integers, got shape \(3,\) and dtype float64"),
        (IMAGES, LABELS, 0, None, "num_classes must be a whole number >= 1, got 0"),
        (IMAGES, LABELS, True, None, "num_classes must be a whole number >= 1, got True"),
        (IMAGES, LABELS, 2, ["cat"], "class_names must be 2 names, got 1"),
    ],
)  # fmt: skip
def test_a_dataset_refuses_what_training_would_trip_over(
    images, labels, num_classes, names, message
):
    with pytest.raises(ValueError, match=message):
        data.Dataset("toy", images, labels, num_classes, names)


def test_a_dataset_is_read_only_and_leaves_the_callers_arrays_alone():
    labels = np.array([0, 1, 1], np.int32)
    toy = data.Dataset("toy", IMAGES, labels, 3)
    with pytest.raises(ValueError, match="read-only"):
        toy.images[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        toy.labels[0] = 1
    assert IMAGES.flags.writeable
    assert labels.flags.writeable
    np.testing.assert_array_equal(toy.counts, [1, 2, 0])


def test_a_subset_keeps_order_and_refuses_indices_out_of_range():
    images = np.arange(48, dtype=np.uint8).reshape(3, 4, 4, 1)
    toy = data.Dataset("toy", images, LABELS, 2)
    part = toy.subset([2, 0])
    np.testing.assert_array_equal(part.images, images[[2, 0]])
    np.testing.assert_array_equal(part.labels, [1, 0])
    for wrong in ([3], [-1], [], [0.5], [[0]]):
        with pytest.raises(ValueError, match="indices"):
            toy.subset(wrong)


@pytest.mark.parametrize(
    ("builder", "split", "message"),
    [
        (LpaTestHidden, "test", r"labels must be in 0\.\.1, got -1 at position 0"),
        (LpaTestDeep, "train", r"images must be a NumPy array of uint8 or float32, got uint16"),
    ],
)
def test_an_error_of_a_split_names_the_set_and_the_split(tmp_path, builder, split, message):
    _prepare_without_tensorflow(builder, tmp_path)
    with pytest.raises(ValueError, match=f"^dataset='{builder.name}', split='{split}': {message}$"):
        data.load(builder.name, split, tmp_path)
