"""Files planted in a workdir or a data set: no code in them runs, no link in them is followed.

The first test shows that what the others plant does run where someone unpickles or imports it.
"""

import importlib
import json
import pathlib
import pickle
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.reporting import style
from experiments.runtime import files
from experiments.training import folder as run_folder
from lpa_jax import data
from lpa_jax.checkpoints import checkpoints as checkpoint
from lpa_jax.checkpoints import manifest
from lpa_jax.checkpoints.checkpoints import CheckpointError, Checkpoints
from lpa_jax.data import builders, sources
from lpa_jax.files import write_bytes


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return pathlib.Path.touch, (self.mark,)


def plant_pickle(path, mark):
    path.write_bytes(pickle.dumps(Planted(mark)))


def plant_npy(path, mark):
    with path.open("wb") as file:
        np.save(file, np.array([Planted(mark)], object), allow_pickle=True)


def plant_npz(path, mark):
    with path.open("wb") as file:
        np.savez(file, w=np.array([Planted(mark)], object))


PLANTS = {"pickle": plant_pickle, "npy": plant_npy, "npz": plant_npz}
UNPICKLERS = {
    "pickle": lambda path: pickle.loads(path.read_bytes()),
    "npy": lambda path: np.load(path, allow_pickle=True),
    "npz": lambda path: np.load(path, allow_pickle=True)["w"],
}


@pytest.fixture(params=PLANTS)
def plant(request, tmp_path):
    """Writes a malicious file to a path; no mark of it may be there after the test."""
    mark = tmp_path / "it ran"
    yield lambda path: PLANTS[request.param](pathlib.Path(path), mark)
    assert not mark.exists()


@pytest.fixture
def planted_module(tmp_path, monkeypatch):
    """Name and mark of a module in a data set's folder, importable from the working directory."""
    mark = tmp_path / "it was imported"
    (tmp_path / "sets_of_a_stranger").mkdir()
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    (tmp_path / "sets_of_a_stranger" / "planted.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield "sets_of_a_stranger.planted", mark
    for name in ("sets_of_a_stranger.planted", "sets_of_a_stranger"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", PLANTS)
def test_the_planted_code_runs_where_someone_unpickles_it(tmp_path, kind):
    path, mark = tmp_path / "planted", tmp_path / "it ran"
    PLANTS[kind](path, mark)
    assert not mark.exists()
    UNPICKLERS[kind](path)
    assert mark.exists()


def test_the_planted_module_runs_where_someone_imports_it(planted_module):
    name, mark = planted_module
    assert not mark.exists()
    importlib.import_module(name)
    assert mark.exists()


STATE = {"w": jnp.arange(3.0)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, STATE)
    return folder


def sign(step):
    """A manifest that is right, as whoever plants a file would write it."""
    record = json.loads((step / manifest.NAME).read_text())
    hashes = manifest.hash_files(step)
    manifest.write(step, manifest.Manifest(record["step"], record["config"], {}, {}, hashes))


def test_in_place_of_any_file_of_a_checkpoint_nothing_planted_runs(saved, tmp_path, plant):
    names = [p.relative_to(saved) for p in saved.glob("step_000000002/**/*") if p.is_file()]
    assert len(names) > 4
    for name in names:
        folder = tmp_path / "checkpoints"
        shutil.copytree(saved, folder)
        plant(folder / name)
        if name.name != manifest.NAME:
            sign(folder / "step_000000002")
        restored = Checkpoints(folder).restore(STATE)
        np.testing.assert_array_equal(restored.state["w"], STATE["w"])
        shutil.rmtree(folder)


def test_a_checkpoint_of_planted_arrays_alone_is_damaged(saved, tmp_path, plant):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved / "step_000000002", folder / "step_000000002")
    arrays = folder / "step_000000002" / "arrays"
    shutil.rmtree(arrays)
    arrays.mkdir()
    for name in ("arrays.npz", "w.npy", "checkpoint", "state.pkl", "_METADATA"):
        plant(arrays / name)
    sign(folder / "step_000000002")
    with pytest.raises(CheckpointError, match="Orbax cannot read its arrays"):
        Checkpoints(folder).restore(STATE)


def test_in_place_of_a_runs_files_nothing_planted_runs(tmp_path, plant):
    for name in (run_folder.CONFIG, run_folder.RESULT):
        plant(tmp_path / name)
        assert files.read_json(tmp_path / name) is None
    assert run_folder.finished_result(tmp_path, {"seed": 0}) is None


def test_in_place_of_a_split_a_list_or_an_image_nothing_planted_runs(tmp_path, plant):
    path = tmp_path / "planted"
    plant(path)
    with pytest.raises(ValueError, match="must be an index file of format"):
        data.load_indices(path, [0, 1, 1])
    with pytest.raises(ValueError, match=r"planted.*(UTF-8|path label)"):
        data.read_list(path, tmp_path)
    (tmp_path / "list").write_text("planted 0\n")
    with pytest.raises(ValueError, match="planted': cannot be decoded"):
        data.read_list(tmp_path / "list", tmp_path)[0]


class LpaTestPlanted(builders.PackagedBuilder):
    """Three images; read from its files under another name, so that no code of it is known."""

    IMAGE_SHAPE, NUM_CLASSES, DESCRIPTION, HOMEPAGE = (2, 2, 1), 2, "", ""

    def _arrays(self):
        return np.zeros((3, 2, 2, 1), np.uint8), np.array([0, 1, 0])

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(*self._arrays(), np.arange(3))}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data_dir with a set that TFDS knows by its files alone."""
    folder = tmp_path_factory.mktemp("prepared")
    with sources._quiet_log(), sources._quiet_preparation():
        LpaTestPlanted(data_dir=str(folder)).download_and_prepare(file_format="array_record")
    old, new = "lpa_test_planted", "set_of_a_stranger"
    (folder / old).rename(folder / new)
    place = folder / new / "1.0.0"
    for path in list(place.iterdir()):
        path.rename(place / path.name.replace(old, new))
    info = place / "dataset_info.json"
    info.write_text(info.read_text().replace(old, new))
    return folder


def test_in_place_of_any_file_of_a_data_set_nothing_planted_runs(prepared, tmp_path, plant):
    assert len(data.load("set_of_a_stranger", "train", prepared)) == 3
    place = prepared / "set_of_a_stranger" / "1.0.0"
    planted = [path.name for path in place.iterdir() if path.is_file()]
    assert {"features.json", "dataset_info.json"} < set(planted)
    for name in planted:
        folder = tmp_path / "data"
        shutil.copytree(prepared, folder)
        plant(folder / "set_of_a_stranger" / "1.0.0" / name)
        where = r"^dataset='set_of_a_stranger'(, split='train')?: "
        with pytest.raises(ValueError, match=where) as refusal:
            data.load("set_of_a_stranger", "train", folder)
        assert "\n" not in str(refusal.value)
        shutil.rmtree(folder)


def test_a_data_set_names_no_module_to_import(prepared, tmp_path, planted_module):
    module, mark = planted_module
    shutil.copytree(prepared, tmp_path / "data")
    features = tmp_path / "data" / "set_of_a_stranger" / "1.0.0" / "features.json"
    own = "tensorflow_datasets.core.features.class_label_feature.ClassLabel"
    assert own in features.read_text()
    features.write_text(features.read_text().replace(own, f"{module}.ClassLabel"))
    with pytest.raises(ValueError, match=f"'{module}.ClassLabel', which is no feature of TFDS"):
        data.load("set_of_a_stranger", "train", tmp_path / "data")
    assert not mark.exists()
    assert len(data.load("set_of_a_stranger", "train", prepared)) == 3


def test_a_link_in_place_of_a_file_is_replaced_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    writers = {
        "result.json": lambda path: files.write_json(path, {}),
        "table.md": lambda path: files.write_text(path, "table"),
        "bytes": lambda path: write_bytes(path, b"bytes"),
        "figure.png": lambda path: style.write_figure(Figure(), path),
        "split.json": lambda path: data.save_indices(path, [0], [0, 1]),
    }
    for name, write in writers.items():
        path = tmp_path / name
        path.symlink_to(precious)
        write(path)
        assert not path.is_symlink() and path.stat().st_size > 0, name
        assert precious.read_text() == "precious", name


@pytest.mark.parametrize("name", ["step_0000/../../../x", "/step_000000001", "step_000000001/.."])
def test_a_step_is_a_number_not_a_path(name):
    assert checkpoint._NAME.fullmatch(name) is None
