"""What the flags of every experiment module promise."""

import importlib

import pytest
from absl import flags

from experiments import compile_check
from experiments.domains.settings import DomainSettings
from experiments.images.settings import Settings
from experiments.measuring.settings import Measuring
from experiments.methods.flags import Perturbing, Searching
from experiments.runtime import fields
from experiments.runtime.hosts import Hosts
from experiments.training.log import Logging
from experiments.training.saving import Saving
from tests.helpers.module_call import forget_flags, own_flags
from tests.helpers.paths import ROOT

FLAGS = flags.FLAGS
PATHS = sorted((ROOT / "experiments").rglob("*.py"))
MODULES = [path.stem for path in PATHS if path.parent.name == "experiments"]
# Flags that are read as the fields of a dataclass, or as the axes of a grid.
OF_FIELDS = {*compile_check.GRID}.union(
    *map(
        fields.flag_names,
        (Settings, DomainSettings, Measuring, Perturbing, Searching, Saving, Logging, Hosts),
    )
)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_every_flag_has_a_help_text_and_is_read(request, name):
    request.addfinalizer(forget_flags)
    importlib.import_module(f"experiments.{name}").define_flags()
    sources = "".join(path.read_text(encoding="utf-8") for path in PATHS)
    assert own_flags()
    for flag in own_flags():
        assert len(FLAGS[flag].help) > 8, flag
        assert f"FLAGS.{flag}" in sources or flag in OF_FIELDS, f"--{flag} is never read"
