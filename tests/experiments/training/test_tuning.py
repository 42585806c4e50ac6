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
