"""Searches as processes: workers that share a folder, signals, flags that a search would ignore."""

import json
import signal

import pytest
from absl import flags

from experiments import tune
from experiments.domains.networks import Trainings
from experiments.methods import flags as method_flags
from experiments.methods import search
from experiments.runtime import fields, hosts
from experiments.training import run as runner
from lpa_jax.files import LockedError, hold, refuse_if_held
from lpa_jax.training.interrupts import InterruptedRunError
from lpa_jax.training.loop import NonFiniteLossError
from tests.helpers.module_call import forget_flags
from tests.helpers.protocols import DOMAIN, DOMAINS, IMAGES

ONE_TRIAL = (*IMAGES.tiny, "--methods=erm", "--trials=1", "--seeds=100-100")


def test_a_share_of_tuning_and_a_trial_are_run_by_one_process(run, tmp_path):
    workdir = tmp_path / "tune"
    arguments = (*ONE_TRIAL, f"--workdir={workdir}")
    for name in ("worker_0", "erm/0000"):
        held = workdir / "locks" / name
        with hold(held):
            message, *_ = run("tune", *arguments)
            assert message.startswith(f"error: {held} is in use by process") and "\n" not in message
            # Another share, which has no trial of one.
            message, out, _ = run("tune", *arguments, "--worker=1", "--num_workers=2")
            assert message is None and "missing" in out
    assert not (workdir / "trials").exists()


@pytest.mark.slow
def test_a_share_of_tuning_and_a_training_are_run_by_one_process(run, tmp_path, monkeypatch):
    seen = []

    def noticed(trainings, training, *_, **__):
        for folder in (trainings.place(training), tmp_path / "locks/worker_0"):
            with pytest.raises(LockedError):
                refuse_if_held(folder)
        seen.append(training.held_out)

    monkeypatch.setattr(Trainings, "run", noticed)
    arguments = (*DOMAIN.tiny, "--methods=erm", "--trials=1", f"--workdir={tmp_path}")
    message, out, _ = run("domain_tune", *arguments)
    assert message is None and "missing" in out and seen == [(domain,) for domain in DOMAINS]
    held = tmp_path / "locks/worker_0"
    with hold(held):
        message, *_ = run("domain_tune", *arguments)
        assert message.startswith(f"error: {held} is in use by process") and "\n" not in message
        assert run("domain_tune", *arguments, "--worker=1", "--num_workers=2")[0] is None
    assert len(seen) == len(DOMAINS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_tuning_that_is_asked_to_stop_exits_as_documented(run, tmp_path, monkeypatch, number):
    def interrupted(*_, should_stop, **__):
        signal.raise_signal(number)
        assert should_stop()
        raise InterruptedRunError("stopped, and what was done is saved")

    monkeypatch.setattr(runner, "run", interrupted)
    status, _, err = run("tune", *ONE_TRIAL, f"--workdir={tmp_path / 'tune'}")
    assert status == str(128 + number)
    assert "stopped, and finished trials are kept; the same command resumes it" in err
    assert not (tmp_path / "tune" / "trials").exists()


def test_a_learning_rate_that_is_given_holds_in_every_trial(run, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "run", lambda *_, **__: {"accuracy": 0.5})
    arguments = (*ONE_TRIAL, f"--workdir={tmp_path}")
    assert run("tune", *arguments, "--learning_rate=0.02")[0] is None
    trial = json.loads((tmp_path / "trials/erm/0000.json").read_text())
    assert trial["options"]["learning_rate"] == 0.02
    header, row = (tmp_path / "trials.csv").read_text().splitlines()
    assert header == "method,trial,validation_accuracy,learning_rate,weight_decay"
    assert row.startswith("erm,0,0.5,0.02,")
    assert "holds trials with other settings" in run("tune", *arguments, "--learning_rate=0.03")[0]


def test_finalists_alone_train_on_the_other_seeds_and_one_of_them_is_chosen(
    run, tmp_path, monkeypatch
):
    # On the first seed trial 1 is best and trial 3 worst; trial 1 diverges on the last seed.
    scores = {
        100: [0.6, 0.8, 0.5, 0.1, 0.7],
        101: [0.6, 0.9, 0.9, 0.9, 0.5],
        102: [0.6, None, 0.9, 0.9, 0.4],
    }
    trained = []

    def score(job, *_, **__):
        options = json.dumps(job.program.options, sort_keys=True)
        number = draws.setdefault(options, len(draws))
        trained.append((number, job.seed))
        if scores[job.seed][number] is None:
            raise NonFiniteLossError("the loss is nan")
        return {"accuracy": scores[job.seed][number]}

    draws = {}
    monkeypatch.setattr(runner, "run", score)
    output = tmp_path / "chosen.json"
    arguments = (*IMAGES.tiny, "--methods=erm", "--trials=5", f"--workdir={tmp_path / 'tune'}")
    arguments += ("--seeds=100-102", "--finalists=3", f"--output={output}")
    for _ in range(2):  # the second finds everything
        assert run("tune", *arguments)[0] is None
        others = [(number, seed) for number in (1, 4, 0) for seed in (101, 102)]
        assert trained == [(number, 100) for number in range(5)] + others
        chosen = json.loads(output.read_text())["methods"]["erm"]
        assert (chosen["trial"], chosen["validation_accuracy"]) == (0, pytest.approx(0.6))
        assert chosen["diverged"] == 1
    table = (tmp_path / "tune/trials.csv").read_text().splitlines()
    assert [line.split(",")[1:4] for line in table] == [
        ["trial", "seeds", "validation_accuracy"],
        ["0", "3", "0.6"], ["1", "3", ""], ["2", "1", "0.5"], ["3", "1", "0.1"],
        ["4", "3", "0.5333333333333333"],
    ]  # fmt: skip
    alone = output.read_text()
    output.unlink()
    for worker in (0, 1, 0):  # only the last finds all trials of the others
        assert not output.exists()
        workers = (f"--worker={worker}", "--num_workers=2", f"--workdir={tmp_path / 'workers'}")
        assert run("tune", *arguments, *workers)[0] is None
    assert output.read_text() == alone and len(trained) == 2 * len(set(trained))
    message, *_ = run("tune", *arguments, "--finalists=2")
    assert "holds trials with other settings (finalists: 3 there, 2 here)" in message
    message, *_ = run("tune", *ONE_TRIAL, "--finalists=2", f"--workdir={tmp_path / 'other'}")
    assert message == "error: --finalists needs at least two seeds in --seeds, got one"


@pytest.mark.parametrize(
    "name", [*fields.flag_names(hosts.Hosts), "multihost", "checkpoint_every", "keep_checkpoints",
             "keep_finished_checkpoints"],
)  # fmt: skip
def test_tuning_knows_no_flag_of_checkpoints_or_hosts(run, tmp_path, name):
    message, *_ = run("tune", *ONE_TRIAL, f"--workdir={tmp_path / 'tune'}", f"--{name}=1")
    assert f"Unknown command line flag '{name}'" in message


@pytest.mark.parametrize(
    ("arguments", "low", "high"),
    [
        ((), 0.5, 10),
        (("--head=normalized",), 10, 60),
        (("--head=normalized", "--space=ldam_drw.scale=29:31"), 29, 31),
    ],
)
def test_ldams_scale_is_searched_around_what_suits_the_head(arguments, low, high):
    try:
        tune.define_flags()
        flags.FLAGS(["tune", *arguments])
        ranges = method_flags.searched_space()
    finally:
        forget_flags()
    hidden = search.HiddenLayers(("hidden1",))
    drawn = [search.draw("ldam_drw", t, hidden, ranges=ranges)["ldam_drw.scale"] for t in range(20)]
    assert low <= min(drawn) < max(drawn) <= high
    assert "ldam.scale" not in search.draw("erm", 0, hidden, ranges=ranges)
