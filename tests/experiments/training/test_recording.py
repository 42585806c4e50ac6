"""What runs log, read back: lines, TensorBoard events, and the figure made of what is logged."""

import json
import struct

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from experiments import report
from experiments.reporting import class_figures
from experiments.training import log as recording
from tests.helpers import made_up_runs

ROW = {"epoch": 1, "train/loss": 0.5, "evaluation/+90%": 0.25, "effect/none": None,
       "classes/hidden1/delta_norm": np.array([1.0, 3.0, np.nan])}  # fmt: skip
WEIGHTS = {"dense": {"kernel": np.arange(6.0).reshape(2, 3), "bias": np.zeros(3)}}


def events(folder):
    """(step, summary value) of every event in a folder's one event file, by its record format."""
    (path,) = folder.glob("events.out.tfevents.*")
    content, start, found = path.read_bytes(), 0, []
    while start < len(content):
        (length,) = struct.unpack("<Q", content[start : start + 8])
        event = event_pb2.Event.FromString(content[start + 12 : start + 12 + length])
        found += [(event.step, value) for value in event.summary.value]
        start += length + 16
    return found


def logged(folder, tensorboard, rows=(), **details):
    """Values by tag of a log with one record, made at step 7."""
    log = recording.RunLog(folder, rows, recording.Logging(tensorboard=tensorboard))
    with log:
        log.write(7, ROW, **details)
    return {value.tag: (step, value) for step, value in events(folder)}


def test_full_tensorboard_holds_histograms_of_weights_and_classes_and_a_figure(tmp_path):
    accuracy = np.array([1.0, 0.5, np.nan])
    found = logged(tmp_path, "full", weights=WEIGHTS, class_accuracy=accuracy)
    assert set(found) == {
        "train/loss", "evaluation/_90_", "classes/hidden1/delta_norm", "weights/dense/kernel",
        "weights/dense/bias", "evaluation/class_accuracy",
    } | {tag for tag in found if tag.startswith("evaluation/class_accuracy")}  # fmt: skip
    assert all(step == 7 for step, _ in found.values())
    assert found["train/loss"][1].simple_value == 0.5
    norms = found["classes/hidden1/delta_norm"][1].histo
    assert (norms.num, norms.min, norms.max, norms.sum) == (2, 1, 3, 4)  # an absent class is none
    kernel = found["weights/dense/kernel"][1].histo
    assert (kernel.num, kernel.sum_squares) == (6, 55)
    every = [value for _, value in events(tmp_path) if value.tag == "evaluation/class_accuracy"]
    assert [value.WhichOneof("value") for value in every] == ["histo", "image"]
    assert every[1].image.encoded_image_string.startswith(b"\x89PNG")


def test_scalars_alone_hold_no_vector_but_the_lines_do(tmp_path):
    assert set(logged(tmp_path, "scalars")) == {"train/loss", "evaluation/_90_"}
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["classes/hidden1/delta_norm"] == [1.0, 3.0, None]


def test_the_options_and_the_final_accuracy_are_compared_in_the_hparams_tab(tmp_path):
    with recording.RunLog(tmp_path) as log:
        log.write(7, ROW)
        log.finish({"method": "lpa", "lpa.radius": 0.25}, 0.75)
    found = {value.tag: value for _, value in events(tmp_path)}
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(found)
    assert b"lpa.radius" in found["_hparams_/session_start_info"].SerializeToString()
    assert b"final/accuracy" in found["_hparams_/experiment"].SerializeToString()
    assert found["final/accuracy"].simple_value == 0.75


def test_a_resumed_log_shows_the_classes_of_its_earlier_records_again(tmp_path):
    earlier = [{"epoch": 1, "step": 3, "classes/hidden1/delta_norm": [2.0, None]}]
    logged(tmp_path, "full", earlier)
    steps = [step for step, value in events(tmp_path) if value.tag == "classes/hidden1/delta_norm"]
    assert steps == [3, 7]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"class_batches": -1},
            "--class_geometry_batches must be a whole number in 0..10+, got -1",
        ),
        ({"tensorboard": "all"}, "--tensorboard must be one of scalars, full, got 'all'"),
    ],
)
def test_bad_logging_names_its_flag(values, message):
    with pytest.raises(ValueError, match=message):
        recording.Logging(**values)


def curve(shift):
    """Two epochs of three classes, of which the last was never in a batch."""
    return [
        {"epoch": epoch, "step": epoch, "train/loss": 1.0}
        | {f"classes/hidden1/{name}": [1.0 + shift * epoch, 1.0, None]
           for name in ("norm_ratio", "loss_change", "cosine", "radius", "sign", "delta_norm")}
        for epoch in (2, 4)
    ]  # fmt: skip


def test_what_was_logged_by_class_is_a_figure_over_epochs_and_part_of_the_report(tmp_path):
    for seed in (0, 1):
        made_up_runs.write(tmp_path / f"runs/{seed}", "lpa", seed, 0.5, curve=curve(0.1 + seed))
    (section,) = report.make([tmp_path / "runs"], tmp_path / "out")
    assert class_figures.over_epochs(section.results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "what the perturbations do to classes" in dict(section.figures)
    without = {"erm": [{"seed": 0, "train_counts": [3], "curve": [{"epoch": 1}]}]}
    assert not class_figures.over_epochs(without, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
