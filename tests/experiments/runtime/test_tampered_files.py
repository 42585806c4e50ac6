"""A field of another type in any JSON file of a command: no traceback, and nothing is lost."""

import copy
import functools
import itertools
import json
import random

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import landscape, layer_sweep
from experiments.images.job import ImageJob
from experiments.measuring.models import Models
from experiments.training import run as training
from lpa_jax import data
from lpa_jax.training.loop import EpochRecord
from tests.helpers.module_call import call_by_name

MISSING = "missing"
WRONG = (MISSING, None, True, -1, 1.5, 10**30, 1e300, float("nan"), "x", "\ud800", [], ["x"], {},
         {"x": "y"}, [[[0]]])  # fmt: skip
IMAGES = ("--dataset=digits", "--imbalance=5", "--epochs=1", "--num_seeds=1")
DOMAINS = ("--dataset=ColoredMNIST", "--images_per_domain=40", "--model=mlp", "--image_size=14",
           "--train_steps=2", "--evaluate_every=1", "--test_domains=+90%")  # fmt: skip
COMMANDS = {
    "long_tail": (*IMAGES, "--methods=erm"),
    "landscape": (*IMAGES, "--methods=erm", "--parts=calibration,geometry"),
    "layer_sweep": (*IMAGES, "--methods=lpa", "--hidden_layers=hidden1"),
    "tune": ("--dataset=digits", "--imbalance=5", "--epochs=1", "--methods=erm", "--trials=2",
             "--seeds=1,2", "--output={output}"),
    "domain_generalization": (*DOMAINS, "--methods=erm", "--num_seeds=1", "--leave_two_out"),
    "domain_tune": (*DOMAINS, "--methods=erm", "--trials=2", "--output={output}"),
}  # fmt: skip
ORDINARY = ("long_tail", "tune")  # the others are slow
CASES = [
    *(pytest.param(n, 4, marks=() if n in ORDINARY else pytest.mark.slow) for n in COMMANDS),
    *(pytest.param(n, 10**6, marks=pytest.mark.stress) for n in COMMANDS),
]
UNREAD = ("flags.json", "logs.json", "output.json", "seed_0.json")


class MadeAgainError(BaseException):
    """The file did not count: the work of the command begins."""


def train(state, stages, batches, epochs, *, evaluate, **_):
    """Stands in for the training."""
    for epoch in range(1, epochs + 1):
        step, metrics = epoch * batches.steps_per_epoch, {"loss": 1.0, "accuracy": 0.5}
        yield state, EpochRecord(epoch, step, metrics, evaluate(state), 1.0, 1.0)


def evaluate(job, state, evaluated, should_stop):
    """Stands in for the evaluation."""
    accuracies = np.full(job.task.num_classes, 0.5)
    metrics = {"accuracy": 0.5, "loss": 1.0, "per_class_accuracy": accuracies}
    return job.evaluation(dict.fromkeys(evaluated, metrics))


def compared(placed, references, outputs):
    """Stands in for a measurement."""
    names = ("agreement", "error_consistency", "cka")
    return {f"{name} {r}": 0.5 for r in references for name in names if references[r] != placed}


def begin(*_, **__):
    raise MadeAgainError


@pytest.fixture
def command(monkeypatch, data_dir, tmp_path):
    """name -> the exit message of its command; trainings and measurements are made up."""
    monkeypatch.setattr(training.loop, "train", train)
    monkeypatch.setattr(training, "evaluate", evaluate)
    monkeypatch.setattr(ImageJob, "_effects", lambda *_: {})
    monkeypatch.setattr(Models, "load", lambda *_: None)
    monkeypatch.setattr(layer_sweep, "compared", compared)
    for name in ("geometry", "calibration"):
        monkeypatch.setitem(landscape.MEASUREMENTS, name, (lambda *_: {"values": {"a": 0.5}}, ()))
    monkeypatch.setattr(landscape, "report", lambda *_: None)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    for name in ("load", "load_domains"):
        monkeypatch.setattr(data, name, functools.cache(getattr(data, name)))

    def call(name):
        place = {"output": tmp_path / "output.json"}
        arguments = [text.format(**place) for text in COMMANDS[name]]
        return call_by_name(data_dir, name, *arguments, f"--workdir={tmp_path / 'run'}", "--quiet")

    return call


def places(value, place=()):
    """Places of all values within a value, itself and the first two of a list included."""
    yield place
    items = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value[:2]) if isinstance(value, list) else items:
        yield from places(item, (*place, key))


def replaced(value, place, new):
    if not place:
        return new
    content = copy.copy(value)
    if len(place) == 1 and new is MISSING:
        del content[place[0]]
    else:
        content[place[0]] = replaced(value[place[0]], place[1:], new)
    return content


def tampered(path, most):
    """Writes the file with a wrong field, and again, and yields what is wrong each time."""
    text = path.read_text()
    content = json.loads(text)
    cases = [case for case in itertools.product(places(content), WRONG) if case != ((), MISSING)]
    for place, wrong in random.Random(path.name).sample(cases, min(most, len(cases))):
        path.write_text(json.dumps(replaced(content, place, wrong)))
        yield place, wrong
    path.write_text(text)


@pytest.mark.filterwarnings("ignore")  # figures of made-up numbers
@pytest.mark.parametrize(("name", "most"), CASES)
def test_a_wrong_field_is_one_line_or_its_run_is_made_again(
    name, most, command, tmp_path, monkeypatch
):
    assert command(name) is None
    monkeypatch.setattr(training.loop, "train", begin)
    monkeypatch.setattr(Models, "load", begin)
    found = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    # The first of a kind; the others are for people.
    kinds = {path.name: path for path in sorted(found) if path.name not in UNREAD}
    broken = []
    for path in kinds.values():
        for place, wrong in tampered(path, most):
            try:
                message = command(name)
            except MadeAgainError:
                message = None
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
            is_line = message is None or (message.startswith("error: ") and "\n" not in message)
            lost = [other for other in kinds.values() if other.read_bytes() != found[other]]
            if not is_line or {*lost} - {path}:
                broken.append((path.name, place, wrong, message, lost))
    assert not broken, "\n".join(map(str, broken))
