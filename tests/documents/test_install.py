"""What an installation brings, and what it says where a package is missing."""

import configparser
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import experiments
from tests.helpers.paths import ROOT

# Python as if some packages were not installed.
WITHOUT = """
import runpy, sys
from importlib.machinery import PathFinder

missing = sys.argv.pop(1).split(",")


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in missing:
            return PathFinder.find_spec(name, path, target)


sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def extras():
    """What setup.cfg lists: the core as "", and the extras by name."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    return {
        extra: [line for line in text.split("\n") if line and not line.startswith("#")]
        for extra, text in texts.items()
    }


def distributions(*names):
    """The installed distributions of some extras, with all that they require in turn."""
    todo = [line for name in names for line in extras()[name]]
    found = set()
    while todo:
        requirement = todo.pop()
        own = re.match(r"lpa_jax\[(.*)\]", requirement)
        if own:
            todo += [line for name in own[1].split(", ") for line in extras()[name]]
            continue
        name = normal(re.match(r"[\w.-]+", requirement)[0])
        if "extra ==" in requirement or name in found:
            continue
        try:
            todo += importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for other systems or versions of Python
        found.add(name)
    return found


def run_without(packages, code, *arguments):
    """Runs code in a Python that does not find these packages."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, ",".join(packages), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def modules(*names):
    """The top-level modules that some extras install."""
    wanted = distributions(*names)
    brought = importlib.metadata.packages_distributions().items()
    return {module for module, by in brought if wanted & {normal(name) for name in by}}


def test_the_core_brings_jax_flax_optax_and_no_package_of_an_extra():
    names = {re.match(r"[\w-]+", line)[0] for line in extras()[""]}
    assert names == {"flax", "jax", "numpy", "optax"}
    only_in_extras = {"tensorflow_datasets", "grain", "matplotlib", "pandas", "PIL", "safetensors"}
    assert not modules("") & only_in_extras
    assert only_in_extras <= modules("experiments")


def test_the_experiments_ask_for_every_package_of_their_extra():
    lines = [line for extra in ("experiments", "data") for line in extras()[extra]]
    listed = {normal(re.match(r"[\w.-]+", line)[0]) for line in lines} - {"lpa-jax"}
    brought = importlib.metadata.packages_distributions()
    asked = {normal(name) for package in experiments._PACKAGES for name in brought[package]}
    assert listed <= asked


@pytest.mark.parametrize("missing", ["pandas", "tensorboardX"])
def test_an_experiment_without_its_extra_says_in_one_line_how_to_install_it(missing):
    run = "runpy._run_module_as_main(sys.argv[1])"
    done = run_without([missing], run, "experiments.long_tail")
    assert done.returncode == 1
    assert f"{missing} is missing: pip install -e '.[experiments]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


NEED_DATA = {
    "tensorflow_datasets": "data.load('digits', 'test')",
    "grain": "data.grain_batches([{'image': 0, 'label': 0}], 0, 1)",
    "PIL": "data.image_files.decode('image.png', 8)",
    "safetensors": "models.pretrained.read('weights')",
}
IMPORT_AND_TRY = """
import importlib
for name in sys.argv[1].split(","):
    importlib.import_module(name)
from lpa_jax import data, models
for code in sys.argv[2:]:
    try:
        eval(code)
    except ModuleNotFoundError as error:
        print(error)
"""


def test_the_library_imports_with_the_core_alone_and_names_the_command_that_installs_data():
    # The builders are classes of TFDS; `lpa_jax.data.load` imports them.
    paths = (ROOT / "lpa_jax").rglob("*.py")
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    names = [name.removesuffix(".__init__") for name in names if "builders" not in name]
    missing = modules("experiments", "test") - modules("")
    assert missing >= set(NEED_DATA)
    done = run_without(missing, IMPORT_AND_TRY, ",".join(names), *NEED_DATA.values())
    assert done.returncode == 0, done.stderr
    expected = [f"{package} is missing: pip install 'lpa_jax[data]'" for package in NEED_DATA]
    assert done.stdout.splitlines() == expected, done.stderr


def test_a_wheel_holds_the_library_alone_and_its_types(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="setuptools is in the extra test")
    for name in ("lpa_jax", "experiments", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"lpa_jax", "lpa_jax-0.1.0.dist-info"}
    assert {"lpa_jax/py.typed", "lpa_jax/data/augment/crop.py"} <= set(names)
