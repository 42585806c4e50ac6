"""The README is short, its code runs, and its commands are those that CI uses."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from experiments.reporting import tables
from tests.helpers import commands
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAIN, TEST = "<!-- main-command -->", "<!-- test-command -->"


def command_after(marker):
    """The command on the second line after a marker, as CI reads it."""
    return README.split(marker + "\n")[1].splitlines()[1]


def test_every_python_block_runs_and_the_loop_fits_twelve_statements():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 1 and len(re.findall(r"^\S", blocks[0], flags=re.MULTILINE)) <= 12
    namespace = {}
    exec(compile(blocks[0], "README.md", "exec"), namespace)
    loss = namespace["lpa_jax"].metrics.compute(namespace["metrics"])["loss"]
    assert namespace["state"].step == 3 and np.isfinite(loss)


def test_the_commands_are_the_ones_ci_extracts():
    for marker, end in ((MAIN, "-m experiments.long_tail"), (TEST, "-m pytest")):
        assert command_after(marker).startswith("python3 -m venv")
        assert command_after(marker).endswith(end)
        assert README.split(marker)[1].startswith("\n```sh\n")
    assert f"/{TEST}/" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_extras_of_the_commands_exist():
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    named = re.findall(r'"?\.?\[(\w[\w,-]*)\]', README.replace("](", ") ("))
    assert "experiments" in named and "test" in named
    for extra in {name for group in named for name in group.split(",")}:
        assert re.search(rf"^{extra} =$", setup, flags=re.MULTILINE), extra


# What the main command found, by method: of each seed the accuracy, and that of the three groups.
FOUND = {
    "erm": [(0.764, 0.99, 0.863333, 0.52), (0.762, 0.976667, 0.863333, 0.525),
            (0.749, 0.97, 0.886667, 0.48)],
    "lpl": [(0.808, 0.953333, 0.863333, 0.6575), (0.808, 0.953333, 0.853333, 0.665),
            (0.8, 0.943333, 0.883333, 0.63)],
    "lpa": [(0.808, 0.976667, 0.87, 0.635), (0.812, 0.953333, 0.893333, 0.645),
            (0.808, 0.966667, 0.883333, 0.6325)],
    "lpa+lpl": [(0.811, 0.96, 0.866667, 0.6575), (0.811, 0.953333, 0.876667, 0.655),
                (0.809, 0.963333, 0.906667, 0.62)],
}  # fmt: skip


def test_the_table_is_what_the_main_command_prints(tmp_path, capsys):
    counts = (400, 239, 143, 86, 51, 30, 18, 11, 6, 4)
    results = {
        method: [
            {"seed": seed, "accuracy": all_, "train_counts": counts, "seconds": 9.9,
             "group_accuracy": dict(zip(tables.CLASS_GROUPS, groups, strict=True))}
            for seed, (all_, *groups) in enumerate(seeds)
        ]
        for method, seeds in FOUND.items()
    }  # fmt: skip
    title = "mnist5k, exponential 100:1, mlp, test accuracy"
    tables.write_comparison(title, results, tmp_path, quiet=True)
    printed = capsys.readouterr().out.rstrip()
    assert max(map(len, printed.splitlines())) <= 80
    assert f"```text\n{printed}\n```" in README


@pytest.mark.slow
def test_the_main_command_prints_that_table(tmp_path):
    # The options of the tests' XLA, several devices among them, change the order of sums.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", "experiments.long_tail", "--quiet", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert f"```text\n{done.stdout.rstrip()}\n```" in README, done.stderr


def test_it_is_short_and_no_line_is_wide_outside_tables_and_the_two_commands():
    lines = README.splitlines()
    assert len(lines) <= 135
    exempt = {command_after(MAIN), command_after(TEST)}
    wide = [line for line in lines if len(line) > 100 and line[0] != "|" and line not in exempt]
    assert wide == []


@pytest.mark.parametrize("command", re.findall(r"`(python -m experiments\.[a-z][^`]*)`", README))
def test_a_command_has_flags_that_exist(command, tmp_path):
    commands.check(re.sub(r"\s+", " ", command), tmp_path)


def test_every_path_that_it_names_exists():
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    images = re.findall(r'src="([^"]+)"', README)
    quoted = re.findall(r"`((?:lpa_jax|experiments|results|docs)/[\w./]*)`", README)
    assert len(images) == 2 and links and quoted
    for path in links + images + quoted:
        assert (ROOT / pathlib.Path(path)).exists(), path
