"""The examples run unchanged and print what they claim."""

import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import notebook

EXAMPLES = pathlib.Path(__file__).parents[2] / "docs" / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as `python docs/examples/NAME.py` would, and returns what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run_one(name):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_one


def accuracies(printed):
    """method -> (accuracy of all classes, of the rare ones), in percent."""
    rows = re.findall(r"^(\w+) +all +([\d.]+)% +rare +([\d.]+)%$", printed, flags=re.MULTILINE)
    return {name: (float(everywhere), float(rare)) for name, everywhere, rare in rows}


LINEN = pytest.param("custom_linen_loop.py", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [LINEN, "custom_nnx_loop.py"])
def test_a_custom_loop_learns_with_and_without_perturbation(name, run):
    found = accuracies(run(name))
    assert list(found) == ["ERM", "LPA"] and found["ERM"] != found["LPA"]
    assert min(found.values())[0] > 80


@pytest.mark.slow
def test_an_existing_model_is_perturbed_at_a_block_and_stays_usable_alone(run):
    printed = run("existing_model.py")
    assert "injection points: input, block1, block2, logits" in printed
    assert "block2/conv" in printed
    found = accuracies(printed)
    assert found["LPA"][0] > 60
    assert "one perturbation per class: (10, 1, 1, 16)" in printed


@pytest.mark.slow
def test_a_text_classifier_is_perturbed_at_a_block_that_returns_a_tuple(run):
    printed = run("text_classifier.py")
    assert float(re.match(r"accuracy ([\d.]+)%", printed).group(1)) > 70


@pytest.mark.slow
def test_pixels_are_perturbed_at_two_resolutions(run):
    printed = run("segmentation.py")
    assert float(re.search(r"pixels right ([\d.]+)%", printed).group(1)) > 25
    assert "perturbations at middle1: (10, 16)\nperturbations at up: (10, 16)" in printed


@pytest.mark.slow
def test_eight_devices_and_a_mesh_train_the_same_network_as_one():
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parents[1])}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "pmap_many_devices.py"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=240,
    )
    assert re.search(r"8 devices; digit 0 of the first batch lies on [2-8] of them", done.stdout)
    losses = np.float64(re.findall(r"loss ([\d.]+) after", done.stdout))
    assert len(losses) == 3 and np.ptp(losses) < 1e-4
    differences = np.float64(re.findall(r"any weight: (\S+)", done.stdout))
    assert len(differences) == 3 and np.all(differences < 1e-4)


def numbers(cell):
    """What a cell prints, without its figures."""
    outputs = [output for output in cell["outputs"] if output["output_type"] != "display_data"]
    return [float(text) for text in re.findall(r"-?\d+\.\d+", json.dumps(outputs))]


@pytest.mark.slow
def test_the_tour_is_committed_with_the_figures_and_the_numbers_that_its_cells_give(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    committed = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    fresh, left = notebook.run(EXAMPLES / "tour.ipynb")
    for before, now in zip(committed, fresh["cells"], strict=True):
        if now["cell_type"] == "code":
            kinds = [
                [output["output_type"] for output in cell["outputs"]] for cell in (before, now)
            ]
            assert kinds[0] == kinds[1] and before["execution_count"] == now["execution_count"]
            # In per cent; other devices add in another order.
            assert numbers(now) == pytest.approx(numbers(before), abs=1.5)
    assert json.dumps(committed).count('"image/svg+xml": [') == 5
    assert (EXAMPLES / "tour.ipynb").stat().st_size < 250_000
    assert (left["geometry"]["sign"] * left["geometry"]["loss_change"] > 0).all()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_at_most_90_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 90
