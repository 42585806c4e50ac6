"""The domain generalization experiment and its tuning, run as the command line would run them."""

import contextlib
import csv
import io
import json
import pathlib
import re
import shutil

import jax
import pytest
from absl import flags

from experiments.domains import selection as domain_selection
from experiments.domains.settings import DomainSettings
from experiments.methods import search
from experiments.training import search_loop
from lpa_jax.training import loop as trainer
from tests.helpers import drawn_texts
from tests.helpers.module_call import call_by_name
from tests.helpers.protocols import DOMAIN, DOMAINS

FLAGS = flags.FLAGS
TINY = DOMAIN.tiny
JOB = ("--methods=erm,lpa", "--steps=1", "--num_seeds=2")


@pytest.fixture(scope="module")
def job(data_dir, tmp_path_factory):
    """A small finished job and what it printed; tests that change it take a copy."""
    workdir = tmp_path_factory.mktemp("domains") / "job"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), drawn_texts.undrawn():
        message = call_by_name(
            data_dir, "domain_generalization", *TINY, *JOB, f"--workdir={workdir}"
        )
    assert message is None
    return workdir, out.getvalue(), err.getvalue()


def read(path):
    return json.loads(pathlib.Path(path).read_text())


def test_every_domain_is_held_out_with_every_method_and_seed(job):
    workdir, out, err = job
    for method in ("erm", "lpa"):
        for seed in (0, 1):
            for domain in DOMAINS:
                folder = workdir / "runs" / method / f"test_{domain}" / f"seed_{seed}"
                result, config = read(folder / "result.json"), read(folder / "config.json")
                assert result["complete"] and result["test_domain"] == config["test_domain"]
                assert [record["step"] for record in result["records"]] == [2, 4]
                for record in result["records"]:
                    assert set(record["in"]) == set(record["out"]) == set(DOMAINS)
                assert result["selections"]["leave_one_domain_out"] is None
                assert result["accuracy"] == result["selections"]["training_domain_validation"]
                assert result["selections"]["oracle"] == result["records"][-1]["in"][domain]
                if method == "lpa":
                    assert config["options"]["lpa.assignment"] == "confidence"
    assert "[12/12]" in err
    out = " ".join(out.split())  # titles are wrapped
    assert "training-domain validation" in out and "oracle (chooses on the test domain)" in out
    assert "leave-one-domain-out" not in out


def test_tables_hold_the_mean_over_domains_and_seeds(job):
    workdir, *_ = job
    results = [read(path) for path in workdir.glob("runs/erm/*/*/result.json")]
    with (workdir / "table.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "erm"]
    assert [row["selection"] for row in rows] == ["training_domain_validation", "oracle"]
    for row in rows:
        accuracies = [result["selections"][row["selection"]] for result in results]
        assert float(row["accuracy_mean"]) == pytest.approx(sum(accuracies) / 6, abs=1e-5)
    text = (workdir / "table.md").read_text()
    assert text.count("| lpa |") == 2 and "| test +80% |" in text


def test_accuracies_are_shares_of_each_part_of_each_domain(job):
    """32 images of a domain are trained or tested on, 8 are its holdout."""
    for path in job[0].glob("trainings/**/training.json"):
        for record in read(path)["records"]:
            for part, size in (("in", 32), ("out", 8)):
                for accuracy in record[part].values():
                    assert accuracy * size == pytest.approx(round(accuracy * size), abs=1e-4)


def test_draws_and_pairs_are_selected_as_the_selections_say(run, tmp_path):
    workdir = tmp_path / "job"
    message, out, _ = run("domain_generalization", *TINY, "--methods=erm", "--num_seeds=1",
                          "--draws=2", "--leave_two_out", f"--workdir={workdir}")  # fmt: skip
    assert message is None and "leave-one-domain-out" in out
    networks = [
        read(path) | read(path.with_name("training_config.json"))
        for path in workdir.glob("trainings/**/training.json")
    ]
    # Three test domains and three pairs, each pair trained once for both of its domains.
    assert len(networks) == 2 * (3 + 3)
    rates = {network["options"]["learning_rate"] for network in networks}
    assert len(rates) == 2
    config = read(workdir / "runs/erm/test_+90%/seed_0/config.json")
    draws = [options["learning_rate"] for options in config["drawn_options"]]
    trainings = [
        domain_selection.Trained(
            frozenset(network["held_out"]),
            draws.index(network["options"]["learning_rate"]),
            network["records"],
        )
        for network in networks
    ]
    for test in DOMAINS:
        result = read(workdir / f"runs/erm/test_{test}/seed_0/result.json")
        chosen = domain_selection.select(trainings, test, DOMAINS)
        assert result["selections"] == {name: choice.accuracy for name, choice in chosen.items()}
        validation = chosen["training_domain_validation"]
        assert result["options"]["learning_rate"] == draws[validation.draw]


@pytest.mark.slow
def test_batch_size_and_dropout_are_drawn_where_asked_and_reach_the_training(
    run, tmp_path, monkeypatch
):
    sizes, rates = [], []
    train, network = trainer.train, DomainSettings.network

    def noticed_train(state, stages, batches, *args, **kwargs):
        sizes.append(batches[0]["label"].size)
        return train(state, stages, batches, *args, **kwargs)

    def noticed_network(*args, **kwargs):
        model = network(*args, **kwargs)
        rates.append(model.dropout)
        return model

    monkeypatch.setattr(trainer, "train", noticed_train)
    monkeypatch.setattr(DomainSettings, "network", noticed_network)
    workdir = tmp_path / "job"
    message, *_ = run("domain_generalization", *TINY, "--methods=erm", "--num_seeds=1", "--draws=3",
                      "--test_domains=+90%", "--space=batch_size=2:6.9",
                      "--space=model_dropout=0.1:0.6", f"--workdir={workdir}")  # fmt: skip
    assert message is None
    drawn = read(workdir / "runs/erm/test_+90%/seed_0/config.json")["drawn_options"]
    assert sizes == [2 * options["batch_size"] for options in drawn] and len(set(sizes)) > 1
    assert {options["model_dropout"] for options in drawn} == set(rates) and len(set(rates)) == 3


def test_pairs_can_be_added_to_a_finished_job(run, job, tmp_path):
    workdir = pathlib.Path(shutil.copytree(job[0], tmp_path / "job"))
    message, _, err = run("domain_generalization", *TINY, "--methods=erm", "--num_seeds=2",
                          "--leave_two_out", f"--workdir={workdir}")  # fmt: skip
    assert message is None and "[6/6]" in err
    result = read(workdir / "runs/erm/test_-90%/seed_1/result.json")
    assert 0 <= result["selections"]["leave_one_domain_out"] <= 1


def test_tuning_never_opens_the_held_out_domain_and_its_file_is_used_by_test_domain(run, tmp_path):
    output = tmp_path / "hparams.json"
    common = (*TINY, "--methods=erm", "--test_domains=+90%,-90%", "--trials=3",
              f"--output={output}", f"--workdir={tmp_path / 'tune'}")  # fmt: skip
    message, out, _ = run("domain_tune", *common, "--num_workers=2", "--worker=1")
    assert message is None and "missing" in out and not output.exists()
    message, out, _ = run("domain_tune", *common)
    assert message is None and "without -90%" in out
    scores = {}
    for path in tmp_path.glob("tune/trainings/erm/*/*/*/training.json"):
        config = read(path.with_name("training_config.json"))
        (test,) = config["held_out"]
        for record in read(path)["records"]:
            assert not record["in"] and set(record["out"]) == set(DOMAINS) - {test}
            score = sum(record["out"].values()) / 2
            scores.setdefault(test, {}).setdefault(json.dumps(config["options"]), []).append(score)
    chosen = read(output)["methods"]["erm"]
    for test in ("+90%", "-90%"):
        best = max(max(of_trial) for of_trial in scores[test].values())
        found = chosen["by_test_domain"][test]
        assert found["validation_accuracy"] == pytest.approx(best)
        assert max(scores[test][json.dumps(found["options"])]) == pytest.approx(best)
    message, out, err = run("domain_generalization", *TINY, "--methods=erm,dropout",
                            "--num_seeds=1", f"--hparams={output}",
                            f"--workdir={tmp_path / 'job'}")  # fmt: skip
    assert message is None and "tuned on validation" in err
    untuned = "Not tuned, because hparams.json lacks them: dropout."
    assert f"{untuned}\n" in err and untuned in (tmp_path / "job/table.md").read_text()
    assert (
        "tuned on networks that trained on them" in " ".join(out.split())
        and out.count("too: +80%.") == 1
    )
    for test in DOMAINS:
        expected = chosen["by_test_domain"].get(test, {"options": chosen["chosen"]})["options"]
        config = read(tmp_path / f"job/runs/erm/test_{test}/seed_0/config.json")
        assert config["options"] == expected


@pytest.mark.slow
def test_a_run_that_diverges_is_recorded_and_the_others_are_trained(run, tmp_path):
    workdir = tmp_path / "job"
    message, out, _ = run("domain_generalization", *TINY, "--methods=erm,lpa", "--num_seeds=1",
                          "--option=lpa.radius=1e38", f"--workdir={workdir}")  # fmt: skip
    assert re.search(
        r"error: \d of \d runs failed: lpa without .* seed 0: the .* at step \d", message
    )
    assert "Failed: lpa without" in out
    methods = {json.loads(p.read_text())["method"] for p in workdir.rglob("runs/**/result.json")}
    assert methods == {"erm"}


def test_a_trial_that_diverged_is_not_chosen():
    trials = {0: {"learning_rate": 1.0}, 1: {"learning_rate": 0.1}}

    def choose(scores):
        return search_loop.choose(
            [
                (trial, test, {"options": trials[trial], "score": score})
                for (trial, test), score in scores.items()
            ]
        )

    chosen = choose({(0, "a"): 0.9, (0, "b"): None, (1, "a"): 0.5, (1, "b"): 0.4})
    assert chosen["chosen"] == trials[1] and chosen["validation_accuracy"] == pytest.approx(0.45)
    assert chosen["by_test_domain"]["a"]["options"] == trials[0]
    assert chosen["by_test_domain"]["b"]["options"] == trials[1]
    assert choose({(0, "a"): 0.9, (0, "b"): None}) is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--test_domains=+70%"],
            "--test_domains: ColoredMNIST has no domain '+70%'; it has: +90%",
        ),
        (["--test_domains=+90%,+90%"], "--test_domains must name different domains"),
        (["--draws=0"], "--draws must be a whole number in 1..10000, got 0"),
        (["--draws=2", "--hparams=/nowhere.json"], "--hparams must be none"),
        (["--option=coral.layer=input", "--methods=coral"], "coral"),
        (["--evaluate_every=3"], "--evaluate_every must divide --train_steps=4"),
        (["--accumulate=3"], "--accumulate=3 must divide the 8 examples that a device takes"),
        (["--train_steps=0"], "--train_steps must be a whole number in 1..1000000000, got 0"),
        (["--holdout_fraction=1"], "--holdout_fraction must be in (0, 1), got 1.0"),
        (["--images_per_domain=4"], "--holdout_fraction=0.2 leaves no held-out image"),
        (["--images_per_domain=9999"], "--images_per_domain=9999: "),
        (["--image_size=20"], "image_size must be 28 or 14 for ColoredMNIST, got 20"),
        (["--dataset=PACS", "--data_dir=/nowhere"], "'/nowhere/PACS'"),
        (["--learning_rate_range=1"], "--learning_rate_range must be two numbers"),
    ],
)
def test_bad_input_gets_one_line_that_names_it_and_nothing_is_written(refusal, arguments, expected):
    assert expected in refusal("domain_generalization", *TINY, *arguments)


def test_a_batch_that_does_not_split_over_the_devices_is_refused(refusal, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    message = refusal("domain_generalization", *TINY)
    assert "--batch_size: the 8 examples of a step do not split evenly over 3 devices" in message


def test_ranges_replace_the_usual_ones_for_what_they_name_alone():
    hidden = search.HiddenLayers(("hidden1", "hidden2"))
    usual = [search.draw("lpa", trial, hidden) for trial in range(20)]
    narrow = {
        "lpa.radius": search.LogUniform(1e-4, 1e-3),
        "learning_rate": search.LogUniform(1e-3, 2e-3),
    }
    drawn = [search.draw("lpa", trial, hidden, ranges=narrow) for trial in range(20)]
    for ours, theirs in zip(drawn, usual, strict=True):
        assert 1e-3 <= ours["learning_rate"] <= 2e-3 and ours["lpa.radius"] <= 1e-3
        for name in ("weight_decay", "lpa.negative_scale", "lpa.layer"):
            assert ours[name] == theirs[name]
    assert max(options["lpa.radius"] for options in usual) > 0.1


@pytest.mark.parametrize("method", ["lpa", "adversarial", "lpa@stage3+lpl"])
def test_radii_are_smaller_in_layers_with_positions_and_nothing_else_changes(method):
    dense = search.HiddenLayers(("stage3", "pool"))
    hidden = search.hidden_layers("small_cnn", ("stage3", "pool"))
    assert hidden == search.HiddenLayers(("stage3", "pool"), frozenset({"stage3"}))
    part, _, placed = method.partition("+")[0].partition("@")
    found = set()
    for trial in range(20):
        usual = search.draw(method, trial, dense)
        drawn = search.draw(method, trial, hidden)
        layer = placed or drawn[f"{part}.layer"]
        found.add(layer)
        if layer == "stage3":
            radius = drawn.pop(f"{part}.radius")
            assert radius <= 0.1 and radius < usual.pop(f"{part}.radius")
        assert drawn == usual
    assert found == ({placed} if placed else {"stage3", "pool"})
