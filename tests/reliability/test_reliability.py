"""Runs that are stopped, killed, moved or damaged end as if nothing had happened: a fixed sample.

The full counts stand in tests/stress; docs/reliability.md has its results.
"""

import json
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runtime import files
from experiments.training import folder as run_folder
from experiments.training import log as recording
from experiments.training import run as runner
from experiments.training.saving import Saving
from lpa_jax import data
from lpa_jax.checkpoints import checkpoints as checkpoint
from lpa_jax.files import LockedError, hold, refuse_if_held
from lpa_jax.training import loop as trainer
from lpa_jax.training.interrupts import InterruptedRunError
from tests.helpers import reliability_worker as worker
from tests.helpers.reliability_runs import EXIT_STATUS, Zygote, first_and_last_step

SIGTERM, SIGINT, SIGKILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL


@pytest.fixture(scope="module")
def zygote():
    with Zygote() as zygote:
        yield zygote


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that nothing disturbed, in this process."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    worker.run(folder)
    return folder


def assert_same_outcome(folder, reference):
    arrays, log, result = worker.outcome(folder)
    expected_arrays, expected_log, expected_result = worker.outcome(reference)
    assert log == expected_log
    assert result == expected_result
    assert arrays == expected_arrays


def newest_step(folder):
    return max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*[0-9]"))


STOPS = [
    ("begin step 1", (SIGTERM,)),  # compiling
    ("begin step 5", (SIGINT, SIGINT)),
    ("begin evaluation", (SIGTERM, SIGTERM)),
    ("begin save", (SIGINT, SIGTERM)),
    ("begin restore", (SIGINT,)),
    ("end file", (SIGTERM,)),  # nearly nothing done since the restore
]
KILLS = ["begin step 5", "begin save", "end save", "begin restore", "begin delete",
         "begin evaluation"]  # fmt: skip


@pytest.mark.parametrize("stops", [STOPS[2:3], pytest.param(STOPS, marks=pytest.mark.slow)])
def test_asked_to_stop_in_any_phase_a_run_saves_exits_and_goes_on_bit_for_bit(
    zygote, reference, tmp_path, stops
):
    folder = tmp_path / "run"
    reached = 0
    for phase, signals in stops:
        run = zygote.start(folder, "--pace=0.02")
        assert run.wait_for(phase), run.lines()
        run.send(*signals)
        assert run.wait() == EXIT_STATUS[signals[0]], run.lines()
        lines = run.lines()
        first, last = first_and_last_step(lines) or (reached + 1, reached)
        assert first == reached + 1, "nothing is done twice"
        assert newest_step(folder) == last, "all that was done is saved"
        after = lines[lines.index(f"caught {signals[0].name}") :]
        assert sum(line.startswith("begin step") for line in after) <= 1, "stops at once"
        reached = last
    assert not (folder / "result.json").exists()
    worker.run(folder)
    assert_same_outcome(folder, reference)


@pytest.mark.parametrize("kills", [KILLS[1:2], pytest.param(KILLS, marks=pytest.mark.slow)])
def test_killed_in_any_phase_a_run_loses_at_most_one_interval(zygote, reference, tmp_path, kills):
    folder = tmp_path / "run"
    reached = 0
    for phase in kills:
        run = zygote.start(folder, "--pace=0.01")
        assert run.wait_for(phase), run.lines()
        run.send(SIGKILL)
        assert run.wait() == EXIT_STATUS[SIGKILL]
        steps = first_and_last_step(run.lines())
        if steps is not None:
            assert steps[0] > reached - 3 - 1
            reached = steps[1]
    worker.run(folder)
    assert_same_outcome(folder, reference)


@pytest.fixture(scope="module")
def reference_of_two_devices(zygote, tmp_path_factory):
    """The same run on two devices."""
    folder = tmp_path_factory.mktemp("reference") / "two_devices"
    zygote.finish(folder, devices=2)
    return folder


MIDDLE_OF_AN_EPOCH = "begin step 9"
END_OF_AN_EPOCH = f"begin step {2 * worker.STEPS_PER_EPOCH}"


@pytest.mark.slow
def test_two_devices_resume_bit_for_bit_too(zygote, reference_of_two_devices, tmp_path):
    for phase in (MIDDLE_OF_AN_EPOCH, END_OF_AN_EPOCH, "begin evaluation"):
        run = zygote.start(tmp_path / "run", "--every=never", devices=2)
        assert run.wait_for(phase), run.lines()
        run.send(SIGTERM)
        assert run.wait() == 143
    zygote.finish(tmp_path / "run", devices=2)
    assert_same_outcome(tmp_path / "run", reference_of_two_devices)


def assert_moves(zygote, folder, saved, devices):
    """What was saved after the last step is read on other numbers of devices, and evaluated there.

    Args:
      zygote: what forks the runs.
      folder: for copies.
      saved: a finished run.
      devices: how many to read it on; the state is the same and the loss nearly so.
    """
    states, losses = [], []
    for number in devices:
        shutil.copytree(saved, folder / str(number))
        (folder / str(number) / "result.json").unlink()
        lines = zygote.finish(folder / str(number), devices=number)
        assert lines.count("begin evaluation") == 1 and first_and_last_step(lines) is None
        states.append([line for line in lines if line.startswith(f"state {worker.TOTAL_STEPS} ")])
        arrays, log, result = worker.outcome(folder / str(number))
        expected_arrays, expected_log, expected = worker.outcome(saved)
        assert arrays == expected_arrays
        assert [row["step"] for row in log] == [row["step"] for row in expected_log]
        losses.append(result["loss"])
    assert "begin evaluation" not in zygote.finish(folder / str(devices[-1])), "it is made once"
    assert len(states[0]) == 1 and all(state == states[0] for state in states)
    assert losses == pytest.approx([expected["loss"]] * len(losses), abs=1e-5)


# Quick tests: of a final evaluation in test_protocols.py, of other devices in test_parallel.py.
@pytest.mark.slow
def test_saved_on_one_device_a_final_evaluation_is_made_once_on_two(zygote, reference, tmp_path):
    assert_moves(zygote, tmp_path, reference, (1, 2))


@pytest.mark.slow
def test_saved_on_two_devices_a_final_evaluation_is_made_once_on_one(
    zygote, reference_of_two_devices, tmp_path
):
    assert_moves(zygote, tmp_path, reference_of_two_devices, (2, 1))


def test_a_second_run_is_refused_at_once_and_a_killed_ones_lock_is_free(zygote, tmp_path):
    folder = tmp_path / "run"
    first = zygote.start(folder, "--pace=0.2")
    assert first.wait_for("begin run")
    started = time.monotonic()
    with pytest.raises(LockedError, match=f"is in use by process {first.pid} on "):
        refuse_if_held(folder)
    assert time.monotonic() - started < 5
    second = zygote.start(folder)
    assert second.wait() == 1
    assert second.lines()[-1].startswith("error: ") and f"process {first.pid}" in second.lines()[-1]
    assert time.monotonic() - started < 5
    (folder / "lock").unlink()  # as someone would who takes it for a stale one
    with pytest.raises(LockedError, match="is in use by a process"):
        hold(folder, patience=0).__enter__()
    first.send(SIGKILL)
    first.wait()
    with hold(folder):
        pass


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="must be a regular file"), hold(tmp_path / "work"):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_run_folder_that_leads_out_of_the_workdir_is_refused(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "outside" / "seed_0").mkdir(parents=True)
    (tmp_path / "work" / "runs").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=r"--workdir: .*seed_0 leads out of .*work"):
        run_folder.check_inside(tmp_path / "work", tmp_path / "work" / "runs" / "seed_0")
    run_folder.check_inside(tmp_path / "work", tmp_path / "work" / "missing" / "seed_0")


# In this process from here on.


def test_the_steps_that_are_stopped_and_resumed_take_over_the_memory_of_their_state():
    program, task = worker.make_program(), worker.make_task()
    (_, step), state = program.stages[0], program.init(0)
    jax.block_until_ready(step(state, data.batches(task.train, 0, worker.BATCH)[0]))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after step 8, in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    answers = iter([False] * 10 + [True] * 99)  # one before the run, one for each evaluation batch
    with pytest.raises(InterruptedRunError):
        worker.run(folder, should_stop=answers.__next__)
    assert newest_step(folder) < worker.TOTAL_STEPS
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "wrong",
    [
        "totals",
        pytest.param("position", marks=pytest.mark.slow),
        pytest.param("key", marks=pytest.mark.slow),
    ],
)
def test_the_comparison_notices_a_wrong_data_position_key_or_sum(
    copy, reference, monkeypatch, wrong
):
    restore = checkpoint.Checkpoints.restore

    def restore_wrongly(self, template):
        restored = restore(self, template)
        if wrong == "key":
            return restored._replace(state=restored.state.replace(rng=jax.random.key(99)))
        return restored._replace(totals=jax.tree.map(lambda x: x + 1e-5, restored.totals))

    if wrong in ("key", "totals"):
        monkeypatch.setattr(checkpoint.Checkpoints, "restore", restore_wrongly)
    if wrong == "position":
        fetch = data.batching.Batches.__getitem__
        monkeypatch.setattr(
            data.batching.Batches, "__getitem__", lambda self, step: fetch(self, step + 1)
        )
    worker.run(copy)
    with pytest.raises(AssertionError):
        assert_same_outcome(copy, reference)


def test_the_log_of_an_interrupted_run_is_cut_to_its_checkpoint(copy, reference):
    with (copy / "metrics.jsonl").open("a") as log:
        log.write('{"epoch": 2, "step": 12}\n{"epoch": 3, "st')
    worker.run(copy)
    assert_same_outcome(copy, reference)
    assert len(list(copy.glob("events.out.tfevents.*"))) == 1


def test_a_log_that_is_a_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "precious")
    with recording.RunLog(tmp_path / "run", [{"epoch": 1, "step": 6, "loss": None}]) as log:
        log.write(12, {"epoch": 2, "step": 12, "loss": 0.5})
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2


def test_a_damaged_checkpoint_is_reported_and_the_run_ends_the_same(copy, reference):
    newest = copy / f"checkpoints/step_{newest_step(copy):09d}"
    assert len(list(newest.parent.iterdir())) == 2
    (newest / "manifest.json").write_text("{}")
    said = []
    worker.run(copy, say=said.append)
    assert said == [f"checkpoint {newest.name} is not used: 'manifest.json' is no manifest"]
    assert_same_outcome(copy, reference)


def test_with_damaged_checkpoints_alone_nothing_starts_over(copy):
    for path in copy.glob("checkpoints/step_*/manifest.json"):
        path.unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint in .* is intact"):
        worker.run(copy)


@pytest.mark.parametrize("config", [None, "[" * 100_000])
def test_without_its_configuration_file_a_run_still_refuses_another_one(copy, monkeypatch, config):
    (copy / "config.json").unlink()
    if config is not None:
        (copy / "config.json").write_text(config)
    monkeypatch.setattr(worker, "BATCH", 16)
    with pytest.raises(ValueError, match=r"other settings \(batch_size: 8 there, 16 here\)"):
        worker.run(copy)


def test_a_run_that_breaks_keeps_its_last_good_checkpoint_and_calls_no_other_best(
    tmp_path, monkeypatch
):
    program = worker.make_program()
    fetch = data.batching.Batches.__getitem__

    def poisoned(self, step):
        batch = fetch(self, step)
        return {**batch, "image": batch["image"] * (np.nan if step == 8 else 1)}

    monkeypatch.setattr(data.batching.Batches, "__getitem__", poisoned)
    for _ in range(2):
        with pytest.raises(trainer.NonFiniteLossError, match="at step 8"):
            worker.run(tmp_path)
        kept = checkpoint.Checkpoints(
            tmp_path / "checkpoints",
            config=worker.make_job().configuration(),
        )
        restored = kept.restore(program.init(0))
        assert restored.step == 6 and not (tmp_path / "result.json").exists()
        assert all(bool(jnp.all(jnp.isfinite(p))) for p in jax.tree.leaves(restored.state.params))


def test_the_best_evaluation_outlives_the_run_whenever_the_interval_saved(tmp_path):
    whole = runner.run(
        worker.make_job(), tmp_path,
        saving=Saving("5steps", keep=1, keep_finished=True),
    )  # fmt: skip
    accuracies = {row["step"]: row["evaluation/accuracy"] for row in whole["curve"]}
    best = max(accuracies, key=accuracies.__getitem__)
    assert best != worker.TOTAL_STEPS  # the last step is kept in any case
    kept = {int(path.name.removeprefix("step_")) for path in tmp_path.glob("checkpoints/step_*")}
    assert kept == {best, worker.TOTAL_STEPS}


def test_a_finished_run_leaves_checkpoints_only_where_they_are_wanted(tmp_path):
    config, state = {"seed": 0}, {"w": jnp.zeros(2)}
    for step, kept in ((3, True), (4, False)):
        folder = run_folder.RunFolder(tmp_path, config, Saving(keep_finished=kept))
        checkpoint.Checkpoints(tmp_path / "checkpoints", config=config).save(step, state)
        folder.finish({"complete": True})
        assert (tmp_path / "checkpoints").exists() == kept
    # Killed between the result and the end of its checkpoints:
    checkpoint.Checkpoints(tmp_path / "checkpoints", config=config).save(3, state)
    assert files.read_json(tmp_path / "result.json")["checkpoints_kept"] is False
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run_folder.RunFolder(tmp_path, config, Saving()).result(print)["complete"]
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("every", ["", "5", "0steps", "1.5epochs", "-1minutes", "often"])
def test_an_interval_that_is_none_is_refused_by_its_flag(every):
    with pytest.raises(ValueError, match="--checkpoint_every must be a positive number"):
        Saving(every)
    with pytest.raises(
        ValueError, match=r"--keep_checkpoints must be a whole number in 1\.\.10+, got 0"
    ):
        Saving(keep=0)
