"""Experiments on list files: which splits are opened, what is refused, and one run from files."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
from absl import flags

from experiments import long_tail
from experiments.images import data as task_data
from experiments.images import flags as image_flags
from experiments.images.data import TaskSource
from experiments.images.job import ImageJob
from experiments.images.settings import Settings
from experiments.training import run as runner
from experiments.training.program import Program
from lpa_jax import data
from lpa_jax.data import list_files
from tests.helpers.module_call import forget_flags

_SIZES = (5, 3, 2)  # training images of each class


def _write_list(path, labels):
    rows = []
    for i, label in enumerate(labels):
        name = f"{path.stem}/{i}.png"
        place = path.parent / name
        place.parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (9, 9), (80 * label, 10 * i, 0)).save(place)
        rows.append(f"{name} {label}\n")
    path.write_text("".join(rows))


@pytest.fixture
def folder(tmp_path):
    _write_list(tmp_path / "Places_LT_train.txt", np.repeat([0, 1, 2], _SIZES).tolist())
    _write_list(tmp_path / "Places_LT_val.txt", [0, 1, 2])
    _write_list(tmp_path / "Places_LT_test.txt", [2, 1, 0, 1])
    return tmp_path


@pytest.fixture
def settings(folder):
    return Settings(
        dataset="mine",
        train_list=str(folder / "Places_LT_train.txt"),
        eval_list=str(folder / "Places_LT_test.txt"),
        image_root=str(folder),
        image_size=4,
        profile="none",
        epochs=2,
        batch_size=4,
    ).check()


@pytest.fixture
def published(folder, monkeypatch):
    """Places-LT with three classes."""
    small = list_files.PUBLISHED["Places_LT"]._replace(num_classes=3)
    monkeypatch.setitem(list_files.PUBLISHED, "Places_LT", small)
    return Settings(dataset="Places_LT", data_dir=str(folder), image_size=4, profile="none").check()


def test_lists_give_the_task_and_imagenet_its_normalization(settings):
    task = TaskSource(settings).task(seed=0)
    assert task.counts == _SIZES
    assert task.evaluation.labels.tolist() == [2, 1, 0, 1]
    assert task.train.image_shape == (4, 4, 3)
    assert task.normalization == data.IMAGENET_NORMALIZATION


def test_validation_is_carved_from_a_training_list_without_opening_the_test_list(settings):
    settings = dataclasses.replace(settings, evaluate_on="validation", eval_list="/missing")
    task = TaskSource(settings).task(seed=0)
    np.testing.assert_array_equal(task.counts + task.evaluation.counts, _SIZES)
    assert task.evaluation.counts.tolist() == [1, 1, 1]


def test_published_validation_lists_are_used_and_leave_training_whole(published, folder):
    (folder / "Places_LT_test.txt").unlink()
    task = TaskSource(dataclasses.replace(published, evaluate_on="validation")).task(seed=0)
    assert task.counts == _SIZES
    assert task.evaluation.labels.tolist() == [0, 1, 2]


def test_a_run_from_files_equals_the_run_in_memory(settings, monkeypatch):
    results = []
    for limit in (2**30, 0):
        monkeypatch.setattr(task_data, "_READ_INTO_MEMORY", limit)
        task = TaskSource(settings).task(seed=0)
        assert isinstance(task.train, data.Dataset) == (limit > 0)
        program = Program("erm", {}, settings, task)
        results.append(runner.run(ImageJob(program, task, seed=0), folder=None))
    in_memory, from_files = results
    assert from_files["accuracy"] == in_memory["accuracy"]
    assert from_files["loss"] == in_memory["loss"]
    assert set(from_files["group_accuracy"]) == {"many", "medium", "few"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_list": None, "image_root": None}, "--eval_list=.* needs --train_list"),
        ({"train_list": None, "eval_list": None}, "--image_root=.* needs --train_list or --dat"),
        ({"image_root": None}, "--image_root must be the folder"),
        ({"eval_list": None}, "--eval_list must be set with --train_list"),
        ({"profile": "exponential"}, "--profile must be none with list files.*'exponential'"),
        ({"image_size": 0}, "--image_size must be a whole number in 1..16384, got 0"),
        (
            {"dataset": "ImageNet_LT"} | dict.fromkeys(("train_list", "eval_list", "image_root")),
            r"--data_dir must be the folder that holds ImageNet_LT_train\.txt, got none",
        ),
    ],
)
def test_flags_that_do_not_fit_together_get_one_line(settings, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(settings, **changes).check()
    assert "\n" not in str(error.value)


def test_a_test_label_that_training_lacks_is_refused(settings, folder):
    _write_list(folder / "Places_LT_test.txt", [0, 3])
    with pytest.raises(ValueError, match=r"Places_LT_test\.txt, line 2: label '3' must be in 0"):
        TaskSource(settings)


def test_damaged_images_are_skipped_if_the_flag_says_so_and_that_is_part_of_the_run(
    settings, folder, capsys
):
    (folder / "Places_LT_train" / "1.png").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"mine: 1 of 10 images are damaged: .*1\.png"):
        TaskSource(settings)
    skipping = dataclasses.replace(settings, damaged_images="skip")
    source = TaskSource(skipping)
    assert source.pool.counts.tolist() == [4, 3, 2]
    assert "skipped: mine: 1 of 10 images" in capsys.readouterr().err
    assert skipping.as_dict() != settings.as_dict()


def test_tables_of_a_training_list_bear_its_name_unless_the_flag_gives_one(folder):
    parse = flags.FLAGS
    lists = [f"--{flag}={folder}/Places_LT_{part}.txt" for flag, part in _LIST_FLAGS]
    long_tail.define_flags()
    try:
        parse(["long_tail", *lists, f"--image_root={folder}", "--profile=none"])
        assert image_flags.settings().dataset == "Places_LT_train"
        parse(["long_tail", "--dataset=mine"])
        assert image_flags.settings().dataset == "mine"
        parse(["long_tail", "--prepare"])
        with pytest.raises(ValueError, match="--prepare: list files"):
            image_flags.prepare_data()
    finally:
        forget_flags()


_LIST_FLAGS = (("train_list", "train"), ("eval_list", "test"))
