"""A real experiment of two processes: a signal to one stops both, saved; they go on bit for bit.

Where they would not go on from the same checkpoint they do not go on at all.

A fixed sample; tests/stress/test_reliability_hosts.py has every phase, signal and process.
"""

import shutil
import signal

import pytest

from lpa_jax import data
from tests.helpers import reliability_worker as worker
from tests.helpers.reliability_runs import Zygote, finish_hosts, first_and_last_step, strike_hosts
from tests.reliability.test_reliability import newest_step

# Made-up processes stand for these in test_differing_hosts.py and test_hosts.py.
pytestmark = pytest.mark.slow

STEPS = 16
FLAGS = ("--dataset=digits", "--per_class=12", "--imbalance=4", "--batch_size=8", "--epochs=2",
         "--evaluate_every=1", "--num_seeds=1", "--compilation_cache=", "--checkpoint_every=never",
         "--keep_finished_checkpoints", "--quiet")  # fmt: skip
ERM = ("--methods=erm",)
RUN = "runs/erm/seed_0"


@pytest.fixture(scope="module")
def zygote():
    with Zygote("reliability_experiment") as zygote:
        yield zygote


@pytest.fixture(scope="module")
def flags(data_dir):
    data.prepare("digits", data_dir)
    return (*FLAGS, f"--data_dir={data_dir}")


@pytest.fixture(scope="module")
def stopped(zygote, flags, tmp_path_factory):
    """A workdir in the middle of an epoch: the second process was told to stop."""
    workdir = tmp_path_factory.mktemp("stopped") / "work"
    # JAX looks for signals once a second.
    first, last = strike_hosts(
        zygote, workdir, *flags, *ERM, phase="begin step 2", struck=1, signals=[signal.SIGTERM],
        paces=("0.3", "0"),
    )  # fmt: skip
    assert first == 1 and newest_step(workdir / RUN) == last < STEPS, "all that was done is saved"
    return workdir


def test_a_signal_to_one_of_two_processes_loses_nothing(zygote, flags, stopped, tmp_path):
    flags = (*flags, *ERM)
    finish_hosts(zygote, tmp_path / "whole", *flags)
    workdir = shutil.copytree(stopped, tmp_path / "stopped")
    run = workdir / RUN

    # Of the first, twice, in the evaluation after an epoch.
    before = newest_step(run)
    steps = strike_hosts(
        zygote, workdir, *flags, phase="begin evaluation", struck=0, signals=[signal.SIGINT] * 2,
        paces=("0", "0.4"),
    )  # fmt: skip
    first, last = steps or (before + 1, before)
    assert first == before + 1, "nothing is done twice"
    assert newest_step(run) == last and last % 8 == 0, "it stops in the evaluation"
    assert not (run / "result.json").exists()

    finish_hosts(zygote, workdir, *flags)
    expected = worker.outcome(tmp_path / "whole" / RUN, STEPS)
    assert worker.outcome(run, STEPS) == expected


def test_two_processes_that_find_different_checkpoints_both_refuse(
    zygote, flags, stopped, tmp_path
):
    def files():
        return {path: path.stat().st_mtime_ns for path in (stopped / RUN).rglob("*")}

    before, step = files(), newest_step(stopped / RUN)
    elsewhere = tmp_path / "elsewhere"
    runs = zygote.start_hosts(stopped, *flags, *ERM, elsewhere=elsewhere)
    assert [run.wait() for run in runs] == [1, 1], [run.lines() for run in runs]
    for run, workdir in zip(runs, (stopped, elsewhere), strict=True):
        assert run.lines()[-1] == (
            f"error: {workdir / RUN}: process 0 finds the checkpoint of step {step}, process 1 no "
            "checkpoint (step 0); --workdir must be on a file system that all hosts share"
        )
        assert first_and_last_step(run.lines()) is None, "nothing is trained"
    assert files() == before and not elsewhere.exists(), "nothing is written"
