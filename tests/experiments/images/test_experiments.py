"""Experiment modules, run in this process as the command line would run them."""

import contextlib
import csv
import io
import json
import re

import numpy as np
import pytest
from absl import flags

from experiments import long_tail
from experiments.domains.settings import DomainSettings
from experiments.images.data import TaskSource
from experiments.images.job import ImageJob
from experiments.images.settings import Settings
from experiments.methods import build as assembly
from experiments.reporting import runs
from experiments.training import flags as run_flags
from experiments.training.program import Program
from experiments.training.run import leaks, unreached_targets
from lpa_jax import models, parallel
from tests.helpers.commands import parsed
from tests.helpers.module_call import call_by_name
from tests.helpers.protocols import IMAGES

FLAGS = flags.FLAGS

TINY = IMAGES.tiny
JOB = ("--methods=erm,lpa+lpl,dropout@hidden2", "--num_seeds=2", "--class_geometry_batches=2",
       "--tensorboard=full", "--option=lpa.radius_target=0.2", "--steps=1",
       "--radius=0.1")  # fmt: skip


@pytest.fixture(scope="module")
def job(data_dir, tmp_path_factory):
    """A small finished job and what it printed; tests that change it take a copy."""
    workdir = tmp_path_factory.mktemp("finished") / "job"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        message = call_by_name(data_dir, "long_tail", *TINY, *JOB, f"--workdir={workdir}")
    assert message is None
    return workdir, out.getvalue(), err.getvalue()


def test_a_job_prints_one_table_and_writes_everything_it_promises(job):
    workdir, out, err = job
    for method in ("erm", "lpa+lpl", "dropout@hidden2"):
        assert method in out
        for seed in (0, 1):
            folder = workdir / "runs" / method / f"seed_{seed}"
            result = json.loads((folder / "result.json").read_text())
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")
                     if line]  # fmt: skip
            assert [line["epoch"] for line in lines] == [1, 2]
            assert result["accuracy"] == pytest.approx(lines[-1]["evaluation/accuracy"])
            assert len(list(folder.glob("events.out.tfevents.*"))) == 1
            assert min(result["per_class_accuracy"]) >= 0 and len(result["curve"]) == 2
    assert "[6/6]" in err and "±" in out
    with (workdir / "table.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    accuracies = [
        json.loads((workdir / "runs" / "erm" / f"seed_{seed}" / "result.json").read_text())[
            "accuracy"
        ]
        for seed in (0, 1)
    ]
    assert float(rows["erm"]["accuracy_mean"]) == pytest.approx(sum(accuracies) / 2, abs=1e-6)
    assert (workdir / "table.md").read_text().count("\n| ") == 4
    for figure in ("per_class_accuracy.png", "training_curves.png"):
        assert (workdir / figure).read_bytes().startswith(b"\x89PNG")
    assert json.loads((workdir / "flags.json").read_text())["imbalance"] == 10
    assert json.loads((workdir / "splits" / "seed_1.json").read_text())["meta"]["seed"] == 1


def test_the_loss_change_of_every_sign_group_is_logged(job):
    workdir, *_ = job
    folder = workdir / "runs" / "lpa+lpl" / "seed_0"
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["effect/hidden1/loss_change/positive"] > 0
    assert last["effect/hidden1/loss_change/negative"] < 0
    assert last["effect/logits/loss_change/positive"] > 0


def test_how_a_radius_adapts_to_its_target_is_logged(job):
    workdir, *_ = job
    lines = (workdir / "runs" / "lpa+lpl" / "seed_0" / "metrics.jsonl").read_text().splitlines()
    first, last = map(json.loads, lines)
    for group in ("positive", "negative"):
        name = f"effect/hidden1/radius_scale/{group}"
        # At the radius that is given the loss of either group changes by more than the target.
        assert 0 < last[name] < first[name] < 1
        assert f"effect/logits/radius_scale/{group}" not in last


def test_what_perturbations_do_to_classes_is_logged_on_request_and_drawn(job):
    workdir, *_ = job
    folder = workdir / "runs" / "lpa+lpl" / "seed_0"
    last = json.loads((folder / "result.json").read_text())["curve"][-1]
    sign, radius, moved, change = (
        np.array(last[f"classes/logits/{name}"], float)
        for name in ("sign", "radius", "delta_norm", "loss_change")
    )
    present = np.isfinite(moved)
    assert present.sum() >= 8 and set(sign[present]) == {1.0, -1.0}
    assert np.all(moved[present] <= radius[present] * (1 + 1e-4))
    assert np.all(np.sign(change[present & (moved > 0)]) == sign[present & (moved > 0)])
    assert (
        "classes/hidden2/norm_ratio"
        in (workdir / "runs" / "dropout@hidden2" / "seed_1" / "metrics.jsonl").read_text()
    )
    assert "classes/" not in (workdir / "runs" / "erm" / "seed_0" / "metrics.jsonl").read_text()
    assert (workdir / "class_geometry.png").stat().st_size > 10_000
    (events,) = folder.glob("events.out.tfevents.*")
    assert b"weights/" in events.read_bytes() and b"\x89PNG" in events.read_bytes()


def test_a_run_has_the_head_that_is_asked_for(job, data_dir):
    settings = Settings(dataset="digits", data_dir=str(data_dir), head="normalized")
    task = TaskSource(settings).task(seed=0)
    program = Program("ldam_drw", {}, settings, task)
    assert set(program.init(0).params["logits"]) == {"kernel"}
    assert ImageJob(program, task, 0).configuration()["settings"]["head"] == "normalized"
    # What earlier runs did not write is not asked of them.
    config = json.loads((job[0] / "runs" / "erm" / "seed_0" / "config.json").read_text())
    assert "head" not in config["settings"]


def test_a_balanced_job_keeps_that_many_images_a_class_and_shows_no_shot_groups(run, tmp_path):
    workdir = tmp_path / "job"
    message, out, _ = run("balanced", *TINY, "--methods=lpa", "--num_seeds=1", "--per_class=5",
                          "--epochs=1", "--steps=1", f"--workdir={workdir}")  # fmt: skip
    assert message is None
    assert "5 training images a class" in out
    result = json.loads((workdir / "runs/lpa/seed_0/result.json").read_text())
    assert result["train_counts"] == [5] * 10
    assert result["group_accuracy"] == {}
    config = json.loads((workdir / "runs/lpa/seed_0/config.json").read_text())
    assert config["options"]["lpa.assignment"] == "confidence"


def test_a_label_that_leaks_is_said_once_with_layer_and_radius(run, tmp_path):
    """A contraction of that size makes every example correct, so that nothing else is learned."""
    arguments = ("--methods=lpa", "--layer=input", "--assignment=all_negative", "--radius=2",
                 "--epochs=3", "--evaluate_every=1", "--num_seeds=1")  # fmt: skip
    message, _, err = run("balanced", *TINY, *arguments, f"--workdir={tmp_path}")
    assert message is None
    (line,) = [line for line in err.splitlines() if "tells the network the label" in line]
    assert "at input the perturbation of negative classes" in line and " there) or set" in line
    result = json.loads((tmp_path / "runs/lpa/seed_0/result.json").read_text())
    assert result["curve"][-1]["effect/input/accuracy_change/negative"] > 0.2


def test_a_target_that_no_radius_reaches_is_said_once(run, tmp_path):
    arguments = ("--methods=lpa", "--layer=hidden1", "--assignment=all_positive", "--steps=1",
                 "--radius=1e-6", "--option=lpa.radius_target=9", "--epochs=8",
                 "--evaluate_every=4", "--num_seeds=1")  # fmt: skip
    message, _, err = run("balanced", *TINY, *arguments, f"--workdir={tmp_path}")
    assert message is None
    (line,) = [line for line in err.splitlines() if "lower radius_target" in line]
    assert "at hidden1 the radius of positive classes" in line and "100 times" in line
    row = {"effect/pool/radius_scale/positive": 99.0, "effect/pool/radius_scale/negative": None}
    assert unreached_targets(row) == {}


@pytest.mark.parametrize(
    ("method", "layer", "options"),
    [
        ("lpa", "hidden1", ["lpa.probability"]),
        ("lpl", "logits", []),
        ("lpa+lpl", "logits", []),
        ("lpa+lpl", "hidden1", ["lpa.probability"]),
        ("lpa@hidden1|hidden2+lpl", "hidden2", ["lpa.probability"]),
    ],
)
def test_the_warning_of_a_label_that_leaks_names_options_of_the_method(method, layer, options):
    line = leaks({f"effect/{layer}/accuracy_change/negative": 0.9}, method)[layer]
    assert re.findall(r"[a-z]+\.probability", line) == options and "lower its radius" in line


def test_a_method_may_draw_its_layer_anew_in_every_step(run, tmp_path):
    method = "manifold_mixup@input|hidden1"
    message, *_ = run("long_tail", *TINY, f"--methods={method}", "--num_seeds=1",
                      "--epochs=1", f"--workdir={tmp_path / 'job'}")  # fmt: skip
    assert message is None
    assert (tmp_path / "job" / "runs" / method / "seed_0" / "result.json").exists()
    built = assembly.assemble(
        method, {}, layers=("input", "hidden1", "logits"), layer=None, counts=[2]
    )
    assert list(built.perturbations) == [("input", "hidden1")]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--epochs=0"], "--epochs must be a whole number in 1..1000000, got 0"),
        (["--accumulate=7"], "--accumulate=7 must divide the 64 examples that a device takes"),
        (["--imbalance=0.5"], "--imbalance must be finite and >= 1, got 0.5"),
        (["--imbalance=9999"], "imbalance must be at most 128 for class 5"),
        (["--per_class=0"], "--per_class must be a whole number >= 1, got 0"),
        (["--per_class=9999"], "per_class must be at most 128, the size of class 0, got 9999"),
        (["--milestones=a"], "--milestones must be numbers"),
        (["--milestones=0.5,inf"], "--milestones must be in (0, 1), got inf"),
        (["--decay_factor=nan"], "--decay_factor must be in (0, 1], got nan"),
        (["--warmup_epochs=inf"], "--warmup_epochs must be in [0, 1e+06], got inf"),
        ([f"--epochs={10**25}"], "--epochs must be a whole number in 1..1000000, got 10000"),
        (["--dataset=cifar10"], "or give --prepare once"),
    ],
)
def test_bad_input_gets_one_line_that_names_it_and_nothing_is_written(refusal, arguments, expected):
    assert expected in refusal("long_tail", *TINY, *arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], [0, 1, 2]),
        (["--num_seeds=2"], [0, 1]),
        (["--seeds=4,7"], [4, 7]),
        (["--seeds=4-7"], [4, 5, 6, 7]),
        (["--seeds=4-4"], [4]),
        (["--seeds=0-2, 8"], [0, 1, 2, 8]),
        (["--seeds=8,0-1"], [8, 0, 1]),
        (["--seeds=4294967295-4294967295"], [2**32 - 1]),
    ],
)
def test_seeds_are_counted_or_named(arguments, expected):
    with parsed(long_tail, arguments):
        assert run_flags.seeds() == expected


def test_a_bare_number_counts_as_in_the_first_release_and_one_line_says_what_to_write(capsys):
    with parsed(long_tail, ["--seeds=4"]):
        assert run_flags.seeds() == run_flags.seeds() == [0, 1, 2, 3]
    assert capsys.readouterr().err == (
        "--seeds=4 takes 4 seeds, 0 to 3: write --num_seeds=4 for this, --seeds=4-4 for the one "
        "seed\n"
    )


ALLOWED = "--seeds must be whole numbers in 0..2**32-1, or ranges such as 4-7, at most 1000, got "


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--seeds=0", "--seeds must name seeds, such as 0-3,8;"),
        ("--seeds=100", "write --num_seeds=100 for 100 seeds, --seeds=100-100 for the one seed"),
        ("--seeds=20240101", "--seeds=20240101-20240101 for the one seed, got 20240101"),
        ("--num_seeds=0", "--num_seeds must be a whole number in 1..1000, got 0"),
        ("--num_seeds=1001", "--num_seeds must be a whole number in 1..1000, got 1001"),
        ("--seeds=", f"{ALLOWED}''"),
        ("--seeds=-3", f"{ALLOWED}'-3'"),
        ("--seeds=4-", f"{ALLOWED}'4-'"),
        ("--seeds=1-2-3", f"{ALLOWED}'1-2-3'"),
        ("--seeds=1.5", f"{ALLOWED}'1.5'"),
        ("--seeds=\u0663", f"{ALLOWED}'\u0663'"),
        (f"--seeds={10**25}", f"{ALLOWED}'{10**25}'"),
        (f"--seeds=0-{'9' * 5000}", ALLOWED),
        ("--seeds=4294967296-4294967296", f"{ALLOWED}'4294967296-4294967296'"),
        ("--seeds=0-999,1001", "--seeds must be at most 1000, got '0-999,1001'"),
        ("--seeds=0-4294967295", "--seeds must be at most 1000, got '0-4294967295'"),
        ("--seeds=7-4", "--seeds: the range '7-4' ends before it begins"),
        ("--seeds=0-3,2", "--seeds must name different seeds, got '0-3,2'"),
    ],
)
def test_wrong_seeds_are_named(argument, expected):
    with parsed(long_tail, [argument]), pytest.raises(ValueError, match=re.escape(expected)):
        run_flags.seeds()


def test_seeds_are_named_or_counted_but_not_both():
    both, message = ["--seeds=1,2", "--num_seeds=2"], "--num_seeds and --seeds say the same"
    with parsed(long_tail, both), pytest.raises(ValueError, match=message):
        run_flags.seeds()


def test_tuning_chooses_the_best_validation_trial_and_its_file_is_accepted(run, tmp_path):
    output = tmp_path / "hparams.json"
    common = (*TINY, "--methods=lpa", "--trials=2", "--seeds=100-100", f"--output={output}",
              "--assignment=all_positive", "--layer=hidden2",
              f"--workdir={tmp_path / 'tune'}")  # fmt: skip
    message, out, _ = run("tune", *common, "--num_workers=2", "--worker=1")
    assert message is None and "missing" in out and not output.exists()
    message, *_ = run("tune", *common)
    assert message is None
    chosen = json.loads(output.read_text())["methods"]["lpa"]
    trials = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("tune/trials/lpa/*"))]
    best = max(trials, key=lambda trial: trial["score"])
    assert chosen["chosen"] == best["options"]
    fixed = {"lpa.assignment": "all_positive", "lpa.layer": "hidden2"}
    assert all(fixed.items() <= trial["options"].items() for trial in trials)
    message, _, err = run("long_tail", *TINY, "--methods=lpa", "--num_seeds=1",
                          f"--hparams={output}", f"--workdir={tmp_path / 'job'}")  # fmt: skip
    assert message is None and "tuned on validation" in err
    config = json.loads((tmp_path / "job/runs/lpa/seed_0/config.json").read_text())
    assert config["options"] == best["options"]


def test_tuning_keeps_the_rate_of_the_command_line_and_repeats_a_trial_cut_short(run, tmp_path):
    arguments = (*TINY, "--methods=erm", "--trials=2", "--seeds=100-100", "--learning_rate=0.03",
                 "--weight_decay=0", f"--workdir={tmp_path / 'tune'}")  # fmt: skip
    message, *_ = run("tune", *arguments)
    assert message is None
    given = {"learning_rate": 0.03, "weight_decay": 0.0}
    for path in tmp_path.glob("tune/trials/erm/*"):
        assert json.loads(path.read_text())["options"] == given
    setting = json.loads((tmp_path / "tune/setting.json").read_text())
    assert setting["fixed_options"] == given
    broken = tmp_path / "tune/trials/erm/0001.json"
    before = broken.read_text()
    broken.write_text(before[:50])
    message, _, err = run("tune", *arguments)
    assert (
        message is None and f"{broken} is cut short or not JSON: it will be written again\n" in err
    )
    assert broken.read_text() == before


def test_tuning_draws_from_the_spaces_and_layers_that_flags_name(run, tmp_path):
    arguments = (*TINY, "--methods=lpa", "--trials=2", "--seeds=100-100",
                 f"--workdir={tmp_path / 'tune'}")  # fmt: skip
    message, *_ = run("tune", *arguments, "--search_layers=hidden3",
                      "--space=learning_rate=0.001:0.002", "--space=lpa.steps=1|2")  # fmt: skip
    assert message is None
    trials = [json.loads(path.read_text()) for path in tmp_path.glob("tune/trials/lpa/*")]
    assert len(trials) == 2
    for options in (trial["options"] for trial in trials):
        assert 0.001 <= options["learning_rate"] <= 0.002
        assert options["lpa.steps"] in (1, 2) and options["lpa.layer"] == "hidden3"
    message, *_ = run("tune", *arguments)
    assert "holds trials with other settings" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--space=lpa.radius", "--space: 'lpa.radius': lpa.radius must be a number, got ''"),
        ("--space=learning_rate=2:1", "--space: 'learning_rate=2:1' must be OPTION=LOW:HIGH"),
        ("--search_layers=stage9", "unknown layer 'stage9'"),
        ("--space=batch_size=8:32", "--space: batch_size is drawn in domain generalization alone"),
        ("--space=lpl.radius=1:2 --radius_center=suggest", "--space: lpl.radius is drawn around"),
        ("--output=/", "--output must name a file that can be written, got '/'"),
    ],
)
def test_tuning_refuses_bad_ranges_before_anything_is_written(refusal, arguments, expected):
    assert expected in refusal("tune", *TINY, *arguments.split())


def test_a_workdir_of_tuning_that_is_a_file_is_one_line(run, tmp_path):
    (tmp_path / "tune").write_text("")
    message, *_ = run("tune", *TINY, "--methods=erm", f"--workdir={tmp_path / 'tune'}")
    assert message.startswith("error: ") and "tune" in message and "\n" not in message


def test_tuning_refuses_the_test_images(refusal):
    message = refusal("tune", *TINY, "--evaluate_on=test")
    assert "--evaluate_on must be validation" in message


def test_a_run_that_diverges_is_recorded_with_its_step_and_the_others_are_trained(run, tmp_path):
    workdir = tmp_path / "job"
    arguments = ("--methods=lpa,erm", "--option=lpa.radius=1e38", "--num_seeds=1")
    message, out, err = run("long_tail", *TINY, *arguments, f"--workdir={workdir}")
    assert re.fullmatch(
        "error: 1 of 2 runs failed: lpa seed 0: the (training loss|gradient's norm) is "
        "(nan|infinite) at step 0; the table holds the others",
        message,
    )
    assert "lpa seed 0: failed: the " in err and "erm" in out and "Failed: lpa seed 0: the" in out
    assert [path.parent.parent.name for path in workdir.rglob("result.json")] == ["erm"]
    (found,), (problem,) = runs.collect([workdir])
    assert found.config["method"] == "erm"
    assert re.match("failed: the .* at step 0", problem.reason)


@pytest.mark.parametrize("kind", [Settings, DomainSettings])
def test_accumulation_and_synchronised_batch_norm_reach_the_model(kind):
    settings = kind(model="small_cnn", accumulate=3, sync_batch_norm=True)
    plain = models.create("small_cnn", 5, dtype="float32")
    network = settings.over_devices(plain, 6)
    # On one device there is no axis to synchronise over.
    assert (network.micro_batches, network.network.model) == (3, plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "batch_axis", lambda: "devices")
        network = settings.over_devices(plain, 6)
    assert network.network.model.axis_name == "devices"
    with pytest.raises(
        ValueError, match=r"--sync_batch_norm: option of model 'mlp' must be .*'axis_name'"
    ):
        kind(model="mlp", sync_batch_norm=True).over_devices(models.create("mlp", 5), 6)
