"""The layer sweep: what is placed where, one job from training to figure, resuming, bad input."""

import csv
import json
import types

import jax
import numpy as np
import pytest

from experiments import landscape, layer_sweep
from experiments.measuring import models as trained
from experiments.measuring import similarity
from lpa_jax.diagnostics import prediction_agreement
from tests.helpers import drawn_texts, tiny_models
from tests.helpers.module_call import call

TINY = (
    "--dataset=digits", "--imbalance=10", "--epochs=1", "--evaluate_every=1", "--num_seeds=2",
    "--methods=adversarial", "--steps=1", "--hidden_layers=hidden2",
    "--layer_radii=hidden2=0.3", "--compilation_cache=", "--quiet", "--class_geometry_batches=3",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_mlp():
    """Two small hidden layers, of which one is swept, compile in less time than three."""
    with tiny_models.mlp_of(64, 32):
        yield


@pytest.fixture(scope="module")
def job(data_dir, tmp_path_factory):
    """A finished sweep: its folder, what it printed, the outputs of the models it loaded."""
    workdir = tmp_path_factory.mktemp("sweep") / "job"
    arguments = (*TINY, f"--workdir={workdir}", f"--data_dir={data_dir}")
    seen, original = {}, trained.outputs

    def recorded(model, found=None):
        seen[model.method, model.seed] = original(model, found)
        return seen[model.method, model.seed]

    with pytest.MonkeyPatch.context() as patch, drawn_texts.undrawn():
        patch.setattr(trained, "outputs", recorded)
        message, out = call(layer_sweep, *arguments)
    assert message is None
    return types.SimpleNamespace(arguments=arguments, workdir=workdir, out=out, outputs=seen)


def table(workdir):
    with (workdir / "layer_sweep.csv").open() as file:
        return {(row["method"], row["measure"]): row for row in csv.DictReader(file)}


def test_agreement_is_that_of_the_trained_models_averaged_over_seeds(job):
    rows = table(job.workdir)
    for method, reference, other in (
        ("adversarial@hidden2", "input", "adversarial@input"),
        ("adversarial@hidden2", "erm", "erm"),
        ("adversarial@input", "logits", "adversarial@logits"),
    ):
        shares = [
            prediction_agreement(job.outputs[method, s].logits, job.outputs[other, s].logits)
            for s in (0, 1)
        ]
        row = rows[method, f"agreement {reference}"]
        assert float(row["mean"]) == pytest.approx(np.mean(shares), rel=1e-5)
        assert int(row["seeds"]) == 2
        assert 0 < float(rows[method, f"cka {reference}"]["mean"]) <= 1.01
    assert rows["adversarial@input", "agreement input"]["mean"] == ""  # with itself: nothing to say
    assert (job.workdir / "layer_sweep.png").exists()
    assert "adversarial@hidden2" in job.out and "vs erm" in job.out


def test_what_the_perturbation_does_is_tabled_and_drawn_by_layer(job):
    rows = table(job.workdir)
    for layer in ("input", "hidden2", "logits"):
        curves = [
            json.loads(
                (job.workdir / f"runs/adversarial@{layer}/seed_{s}/result.json").read_text()
            )["curve"][-1]
            for s in (0, 1)
        ]
        change = [curve[f"effect/{layer}/loss_change/neutral"] for curve in curves]
        row = rows[f"adversarial@{layer}", "loss_change neutral"]
        assert float(row["mean"]) == pytest.approx(np.mean(change), rel=1e-4)
        found = float(rows[f"adversarial@{layer}", "correlation of loss and norm"]["mean"])
        correlations = []
        for curve in curves:
            values = np.array(
                [curve[f"classes/{layer}/{k}"] for k in ("loss_change", "norm_ratio")], float
            )
            values = values[:, np.isfinite(values).all(axis=0)]
            correlations.append(np.corrcoef(values)[0, 1])
        assert found == pytest.approx(np.mean(correlations), abs=1e-4)
    assert (job.workdir / "layer_sweep_geometry.png").exists()


def test_loaded_weights_reproduce_the_accuracy_of_the_run(job):
    for (method, seed), found in job.outputs.items():
        result = json.loads(
            (job.workdir / "runs" / method / f"seed_{seed}" / "result.json").read_text()
        )
        accuracy = np.mean(found.logits.argmax(axis=1) == found.labels)
        assert accuracy == pytest.approx(result["accuracy"], abs=1e-6)
    assert {m for m, _ in job.outputs} == {
        "erm",
        "adversarial@input",
        "adversarial@hidden2",
        "adversarial@logits",
    }


def test_a_radius_of_a_single_layer_reaches_its_run_alone(job):
    def radius(layer):
        config = job.workdir / "runs" / f"adversarial@{layer}" / "seed_0" / "config.json"
        return json.loads(config.read_text())["options"].get("adversarial.radius")

    assert radius("hidden2") == 0.3 and radius("input") != 0.3


def test_a_finished_sweep_loads_no_model(job, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a finished measurement is made again")

    monkeypatch.setattr(trained.Models, "load", refuse)
    before = table(job.workdir)
    with drawn_texts.undrawn():
        message, _ = call(layer_sweep, *job.arguments)
    assert message is None and table(job.workdir) == before


def test_identical_networks_agree_fully_and_a_dead_layer_has_no_cka():
    rng = np.random.default_rng(0)
    one = trained.Outputs(rng.normal(size=(9, 3)), rng.normal(size=(9, 4)), np.arange(9) % 3)
    same = similarity.similarity_of(one, one, 9)
    assert same == pytest.approx({"agreement": 1.0, "error_consistency": 1.0, "cka": 1.0})
    assert np.isnan(
        similarity.similarity_of(one, one._replace(features=np.zeros((9, 4))), 9)["cka"]
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--methods=erm"], "error: --methods must have a perturbation without a layer, got 'erm'"),
        (["--methods=lpa@hidden1"],
         "error: --methods must have a perturbation without a layer, got 'lpa@hid"),
        (["--methods=lpa,lpa"], "error: --methods must name different methods, got 'lpa,lpa'"),
        (["--layer=hidden1"], "error: --layer must not be given (hidden1): use --hidden_layers"),
        (["--hidden_layers=stage9"], "error: --hidden_layers must be one of hidden1, hidden2, got"),
        (["--layer_radii=hidden2:0.1"], "error: --layer_radii must be LAYER=RADIUS, got 'hidden2:"),
        (["--layer_radii=top=0.1"], "error: --layer_radii: "),
        (["--layer_radii=input=-1"], "error: --layer_radii: input must be finite and >= 0, got -1"),
        (["--cka_images=3"], "error: --cka_images must be a whole number in 4..20000, got 3"),
        (["--nokeep_finished_checkpoints"], "error: --keep_finished_checkpoints must be true"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line_before_anything_is_written(tmp_path, arguments, expected):
    message, _ = call(layer_sweep, f"--workdir={tmp_path / 'new'}", "--dataset=digits", *arguments)
    assert message.startswith(expected) and "\n" not in message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("module", [layer_sweep, landscape])
def test_several_processes_are_refused_before_anything_is_trained(tmp_path, monkeypatch, module):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    message, _ = call(module, f"--workdir={tmp_path / 'new'}", "--dataset=digits")
    assert message == (
        "error: models are measured by one process, not 2; it takes from --workdir what several "
        "have trained with --keep_finished_checkpoints"
    )
    assert not (tmp_path / "new").exists()


def test_a_run_without_its_weights_is_named(tmp_path):
    folder = tmp_path / "runs" / "erm" / "seed_1"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"complete": true, "checkpoints_kept": false}')
    message, _ = call(layer_sweep, *TINY, f"--workdir={tmp_path}")
    assert message.startswith(
        f"error: --workdir: {folder} holds a finished run without its weights"
    )
