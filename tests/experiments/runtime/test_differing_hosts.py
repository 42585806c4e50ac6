"""Processes that found different things refuse to train; here the others are made up.

tests/experiments/runtime/test_interrupted_hosts.py has two real ones.
"""

import types

import jax.numpy as jnp
import pytest

from experiments.domains.networks import Training, Trainings
from experiments.domains.settings import DomainSettings
from experiments.runtime import hosts
from experiments.runtime.hosts import FINISHED, UNFINISHED, DifferingHostsError, Found
from experiments.runtime.progress import RunProgress
from experiments.training.folder import RunFolder
from experiments.training.saving import Saving
from lpa_jax.checkpoints.checkpoints import Checkpoints
from tests.helpers.module_call import call_by_name
from tests.helpers.protocols import IMAGES

SHARE = "; --workdir must be on a file system that all hosts share"
START, EIGHT = Found(0, b"run", b""), Found(8, b"run", b"eight")
CONFIG, STATE = {"seed": 0}, {"w": jnp.ones(2)}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([START], None),
        ([EIGHT, EIGHT, EIGHT], None),
        (
            [START, EIGHT],
            "process 0 finds no checkpoint (step 0), process 1 the checkpoint of step 8" + SHARE,
        ),
        (
            [EIGHT, EIGHT, EIGHT._replace(step=4), START],
            "process 0 finds the checkpoint of step 8, process 2 the checkpoint of step 4" + SHARE,
        ),
        (
            [EIGHT, EIGHT._replace(checkpoint=b"other")],
            "processes 0 and 1 find different checkpoints of step 8" + SHARE,
        ),
        (
            [START, START._replace(run=b"other")],
            "processes 0 and 1 are about to train different things; all need the same flags and "
            "data, and" + SHARE.removeprefix(";"),
        ),
        (
            [START._replace(step=UNFINISHED), START._replace(step=FINISHED)],
            "process 0 finds an unfinished run, process 1 a finished run" + SHARE,
        ),
    ],
)
def test_a_difference_is_said_with_who_found_what(found, expected):
    assert hosts.difference(found) == expected


@pytest.fixture
def second(monkeypatch):
    """Makes up a second process that found the same as the first, but for what is given.

    `at` is what the first must have found for that, as a step.
    """

    def differs(at=None, **fields):
        def from_all(found):
            return [found, found._replace(**fields) if at in (None, found.step) else found]

        monkeypatch.setattr(hosts, "_from_all", from_all)

    return differs


def run_folder(path):
    return RunFolder(path, CONFIG, Saving())


def test_one_process_agrees_with_itself(tmp_path):
    assert run_folder(tmp_path).result(print) is None
    assert run_folder(tmp_path).begin(STATE, print).step == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": 5}, "process 0 finds the checkpoint of step 3, process 1 the checkpoint of st"),
        ({"checkpoint": bytes(32)}, "processes 0 and 1 find different checkpoints of step 3"),
        ({"run": bytes(32)}, "processes 0 and 1 are about to train different things"),
    ],
)
def test_a_run_does_not_begin_where_another_process_begins_differently(
    tmp_path, second, fields, message
):
    Checkpoints(tmp_path / "checkpoints", config=CONFIG).save(3, STATE)
    second(**fields)
    with pytest.raises(DifferingHostsError, match=message):
        run_folder(tmp_path).begin(STATE, print)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"], "nothing is written"
    second()
    assert run_folder(tmp_path).begin(STATE, print).step == 3


def test_a_process_that_takes_a_checkpoint_for_damaged_says_so(tmp_path, second):
    checkpoints = Checkpoints(tmp_path / "checkpoints", config=CONFIG)
    for step in (3, 6):
        checkpoints.save(step, STATE)
    (tmp_path / "checkpoints" / "step_000000006" / "manifest.json").write_text("{}")
    second(step=6)
    with pytest.raises(DifferingHostsError, match=r"3, process 1 .* 6; .*share \(checkpoint step_"):
        run_folder(tmp_path).begin(STATE, print)


@pytest.mark.parametrize("here", [False, True])
def test_a_result_that_one_process_alone_sees_is_no_result(tmp_path, second, here):
    folder = run_folder(tmp_path)
    Checkpoints(tmp_path / "checkpoints", config=CONFIG).save(3, STATE)
    folder.begin(STATE, print)
    if here:
        # As if it were killed before the end of the checkpoints.
        (tmp_path / "result.json").write_text('{"complete": true, "checkpoints_kept": false}')
    second(step=UNFINISHED if here else FINISHED)
    with pytest.raises(DifferingHostsError, match="finished run"):
        folder.result(print)
    assert (tmp_path / "checkpoints").exists(), "nothing is deleted"


def test_trainings_of_domain_generalization_do_not_begin_differently(tmp_path, second, monkeypatch):
    source = types.SimpleNamespace(task=lambda *_: None, digests={}, names=("0", "1"))
    trainings = Trainings(DomainSettings(), source, tmp_path)
    program = types.SimpleNamespace(init=lambda seed: STATE)
    monkeypatch.setattr(trainings, "program", lambda training: program)
    for at, other in ((UNFINISHED, FINISHED), (0, 50)):
        second(at, step=other)
        with pytest.raises(DifferingHostsError):
            trainings.run(Training("erm", {}, ("0",), 0), RunProgress(1, 1, quiet=True))
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_processes_with_other_seeds_or_methods_are_refused_before_any_begins(
    tmp_path, second, data_dir, capsys
):
    second(run=bytes(32))
    workdir = tmp_path / "job"
    arguments = (*IMAGES.tiny, "--methods=erm", "--num_seeds=2", f"--workdir={workdir}")
    assert call_by_name(data_dir, "long_tail", *arguments) == "1"
    assert "all need the same flags and data" in capsys.readouterr().err
    assert not workdir.exists()


def test_a_process_that_has_not_joined_the_others_of_its_slice_trains_nothing(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="--multihost is missing: this is one of 4 processes"):
        RunFolder(tmp_path / "run", CONFIG, Saving()).begin(STATE, print)
    assert not (tmp_path / "run").exists()
