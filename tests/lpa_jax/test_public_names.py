"""The names that users rely on."""

import importlib
import inspect
import os
import re
import rlcompleter
import statistics
import subprocess
import sys

import pytest

import lpa_jax
from tests.helpers.paths import DOCS

REFERENCE = re.findall(r"^::: (lpa_jax[\w.]*)$", (DOCS / "api.md").read_text(), re.MULTILINE)


def test_tab_completion_shows_the_public_names_alone():
    completer = rlcompleter.Completer({"lpa_jax": lpa_jax})
    shown = {match.partition("(")[0] for match in completer.attr_matches("lpa_jax.")}
    assert shown == {f"lpa_jax.{name}" for name in lpa_jax.__all__}


def test_every_public_name_is_there_after_a_plain_import():
    for name in lpa_jax.__all__:
        assert hasattr(lpa_jax, name), name
    assert lpa_jax.models.MLP(num_classes=2).layers[0] == "input"
    assert inspect.isfunction(lpa_jax.suggest_radius)


def test_every_entry_of_the_reference_is_a_module_or_a_name_of_one():
    assert len(REFERENCE) > 60
    for entry in REFERENCE:
        parent, _, name = entry.rpartition(".")
        if not hasattr(importlib.import_module(parent), name):
            importlib.import_module(entry)


def cpu_seconds(code):
    """CPU time of a fresh Python that runs the code."""
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True)
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system


@pytest.mark.slow
def test_importing_the_library_takes_at_most_a_third_more_than_flax_and_optax():
    pairs = [
        (cpu_seconds("import flax.linen, optax"), cpu_seconds("import lpa_jax")) for _ in range(7)
    ]
    theirs, ours = map(statistics.median, zip(*pairs, strict=True))
    assert ours / theirs <= 1.3


def test_nnx_is_imported_only_by_those_who_use_it():
    code = "import sys, lpa_jax; assert 'flax.nnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
