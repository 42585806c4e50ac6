"""A real experiment of two processes: a signal to one stops both, saved; they go on bit for bit.

A fixed sample; tests/stress/test_reliability_hosts.py has every phase, signal and process.
"""

import signal

import pytest
import reliability_worker as worker
from reliability_runs import Zygote, finish_hosts, strike_hosts
from test_reliability import newest_step

from lpa_jax import data

STEPS = 16
FLAGS = ("--dataset=digits", "--per_class=12", "--imbalance=4", "--batch_size=8", "--epochs=2",
         "--evaluate_every=1", "--seeds=1", "--compilation_cache=", "--checkpoint_every=never",
         "--keep_finished_checkpoints", "--quiet")  # fmt: skip


@pytest.fixture(scope="module")
def zygote():
    with Zygote("reliability_experiment") as zygote:
        yield zygote


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    data_dir = tmp_path_factory.getbasetemp() / "tfds"
    data.prepare("digits", data_dir)
    return (*FLAGS, f"--data_dir={data_dir}")


def test_a_signal_to_one_of_two_processes_loses_nothing(zygote, flags, tmp_path):
    flags = (*flags, "--methods=erm")
    finish_hosts(zygote, tmp_path / "whole", *flags)
    workdir = tmp_path / "stopped"
    run = workdir / "runs" / "erm" / "seed_0"

    # Of the second process, in the middle of an epoch; JAX looks for signals once a second.
    first, last = strike_hosts(
        zygote, workdir, *flags, phase="begin step 2", struck=1, signals=[signal.SIGTERM],
        paces=("0.3", "0"),
    )  # fmt: skip
    assert first == 1 and newest_step(run) == last < STEPS, "all that was done is saved"

    # Of the first, twice, in the evaluation after an epoch.
    before = last
    steps = strike_hosts(
        zygote, workdir, *flags, phase="begin evaluation", struck=0, signals=[signal.SIGINT] * 2,
        paces=("0", "0.4"),
    )  # fmt: skip
    first, last = steps or (before + 1, before)
    assert first == before + 1, "nothing is done twice"
    assert newest_step(run) == last and last % 8 == 0, "it stops in the evaluation"
    assert not (run / "result.json").exists()

    finish_hosts(zygote, workdir, *flags)
    expected = worker.outcome(tmp_path / "whole" / "runs" / "erm" / "seed_0", STEPS)
    assert worker.outcome(run, STEPS) == expected
