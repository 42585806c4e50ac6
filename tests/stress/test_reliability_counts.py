"""The full counts behind test_reliability.py and test_checkpoint.py; each prints survived/tried.

    python -m pytest -n 0 -m stress tests/stress/test_reliability_counts.py

STRESS_SEED and STRESS_KILLS (100) change the random moments and their number.
"""

import collections
import itertools
import os
import shutil
import subprocess
import time

import numpy as np
import pytest

from lpa_jax.checkpoints import manifest
from lpa_jax.checkpoints.checkpoints import CheckpointError, Checkpoints
from tests.helpers import reliability_worker as worker
from tests.helpers.reliability_runs import EXIT_STATUS, Zygote, first_and_last_step
from tests.lpa_jax.checkpoints import test_checkpoint
from tests.lpa_jax.checkpoints.test_checkpoint import template, two_steps  # noqa: F401  (fixtures)
from tests.reliability.test_reliability import (
    SIGINT,
    SIGKILL,
    SIGTERM,
    assert_moves,
    assert_same_outcome,
    newest_step,
    reference,
)

__all__ = ["reference"]
pytestmark = pytest.mark.stress

SEED = int(os.environ.get("STRESS_SEED", "0"))
KILLS = int(os.environ.get("STRESS_KILLS", "100"))
INTERVAL = 3  # steps between saves
KILLS_PER_CHAIN = 5
# Phase -> share of the kills; a kill strikes at a random moment of what follows.
PHASES = {
    "begin save": 0.3,
    "begin step": 0.1,  # the first of a process compiles
    "begin restore": 0.1,
    "end restore": 0.1,
    "begin delete": 0.1,
    "begin evaluation": 0.1,
    "begin file": 0.05,
    "step": 0.15,
}

# Phase -> options of the run, which of its occurrences to strike, seconds within which to do it.
# The phases that are over in a moment are made longer, between the files that they touch.
INSIDE = {
    "compile": (("--compile",), 17, 0.5),
    "restore": ((), 1, 0.1),
    "delete": (("--pace=0.01", "--pace_files=0.01"), 3, 0.1),
    "evaluation": (("--pace_evaluation=0.05",), 2, 0.15),
    "save": ((), 4, 0.2),
}


@pytest.fixture(scope="module")
def zygote():
    with Zygote() as zygote:
        yield zygote


def newest_or_none(folder):
    return newest_step(folder) if list(folder.glob("checkpoints/step_*[0-9]")) else 0


@pytest.mark.parametrize("devices", [1, 2])
def test_killed_at_random_moments(zygote, tmp_path, report, devices):
    rng = np.random.default_rng((SEED, devices))
    kills = KILLS if devices == 1 else KILLS // 10
    whole = tmp_path / "whole"
    zygote.finish(whole, devices=devices)
    struck, equal, chains, lost = collections.Counter(), 0, 0, []
    while struck.total() < kills:
        folder = tmp_path / f"chain{chains}"
        reached = 0
        for _ in range(KILLS_PER_CHAIN):
            phase = str(rng.choice(list(PHASES), p=list(PHASES.values())))
            line = f"begin step {rng.integers(2, worker.TOTAL_STEPS)}" if phase == "step" else phase
            run = zygote.start(folder, "--pace=0.01", devices=devices)
            if run.wait_for(line, int(rng.integers(1, 4)) if phase == "begin save" else 1):
                time.sleep(rng.uniform(0, 0.08))
                run.send(SIGKILL)
            status = run.wait()
            steps = first_and_last_step(run.lines())
            if steps is not None:
                lost.append(max(0, reached - (steps[0] - 1)))
                reached = steps[1]
            if status == 0:
                break
            assert status == EXIT_STATUS[SIGKILL], run.lines()
            struck[phase] += 1
        zygote.finish(folder, devices=devices)
        assert_same_outcome(folder, whole)
        equal, chains = equal + 1, chains + 1
        shutil.rmtree(folder)
    # A step that was under way when the kill came counts as reached.
    assert max(lost) <= INTERVAL + 1
    report(
        f"kill -9, {devices} device(s): {struck.total()}/{struck.total()} resumed, "
        f"{equal}/{chains} chains bit-equal, {max(lost)} steps lost at most; {dict(struck)}"
    )


@pytest.mark.parametrize("phase", INSIDE)
def test_killed_inside_a_phase(zygote, reference, tmp_path, report, phase):
    """At random moments between the beginning and the end that the run itself announces."""
    rng = np.random.default_rng((SEED, *phase.encode()))
    wanted, (options, occurrences, window) = KILLS // 4, INSIDE[phase]
    inside = missed = chains = 0
    while inside < wanted:
        folder = tmp_path / f"chain{chains}"
        for step in (3, int(rng.integers(8, worker.TOTAL_STEPS - 4))):
            # Goes on for a while, since no kill may let a run come further; where kills came after
            # the phase, it may be further already.
            step = max(step, newest_or_none(folder) + 2)
            if step > worker.TOTAL_STEPS:
                break
            run = zygote.start(folder, "--pace=0.01")
            assert run.wait_for(f"begin step {step}"), run.lines()
            run.send(SIGTERM)
            assert run.wait() == 143
            for _ in range(KILLS_PER_CHAIN):
                run = zygote.start(folder, *options)
                if not run.wait_for(f"begin {phase}", int(rng.integers(1, occurrences + 1))):
                    assert run.wait() == 0
                    break
                time.sleep(rng.uniform(0, window))
                run.send(SIGKILL)
                assert run.wait() in (0, EXIT_STATUS[SIGKILL]), run.lines()
                names = [" ".join(line.split()[:2]) for line in run.lines()]
                hit = names.count(f"begin {phase}") > names.count(f"end {phase}")
                inside, missed = inside + hit, missed + (not hit)
            if (folder / "result.json").exists():
                break
        zygote.finish(folder)
        assert_same_outcome(folder, reference)
        chains += 1
        shutil.rmtree(folder)
        report(
            f"kill -9 inside {phase}: {inside}/{inside} resumed, {chains}/{chains} runs bit-equal "
            f"({missed} kills came after its end)"
        )


def test_signals_in_each_phase(zygote, reference, tmp_path, report):
    phases = ["begin run", "begin step 1", "begin step 9", "begin evaluation", "begin save",
              "begin delete"]  # fmt: skip
    tried = 0
    for phase, number, times in itertools.product(phases, (SIGTERM, SIGINT), (1, 2)):
        folder = tmp_path / f"run{tried}"
        run = zygote.start(folder, "--pace=0.01")
        assert run.wait_for(phase)
        run.send(*[number] * times)
        assert run.wait() == EXIT_STATUS[number], run.lines()
        _, last = first_and_last_step(run.lines()) or (0, 0)
        assert newest_or_none(folder) == last
        zygote.finish(folder)
        assert_same_outcome(folder, reference)
        tried += 1
        shutil.rmtree(folder)
    report(f"signals: {tried}/{tried} saved what was done, exited as documented and ended equal")


def test_five_resumes_in_a_chain(zygote, reference, tmp_path, report):
    rng = np.random.default_rng(SEED)
    chains = 5
    for chain in range(chains):
        folder = tmp_path / f"run{chain}"
        for step in sorted(rng.choice(np.arange(2, worker.TOTAL_STEPS), 5, replace=False)):
            run = zygote.start(folder, "--every=never", "--pace=0.01")
            assert run.wait_for(f"begin step {step}")
            run.send(SIGTERM)
            assert run.wait() == 143
        zygote.finish(folder)
        assert_same_outcome(folder, reference)
    report(f"chains of five resumes: {chains}/{chains} bit-equal")


def test_saved_on_some_devices_and_read_on_others(zygote, tmp_path, report):
    numbers = (1, 2, 4, 8)
    for saved_on in numbers:
        saved = tmp_path / f"saved_on_{saved_on}"
        zygote.finish(saved, devices=saved_on)
        assert_moves(zygote, tmp_path / f"from_{saved_on}", saved, numbers)
    pairs = len(numbers) * (len(numbers) - 1)
    report(f"saved on 1, 2, 4 or 8 devices, read on another number: {pairs}/{pairs} the same state")


def test_damage_to_every_file(two_steps, template, tmp_path, monkeypatch, report):  # noqa: F811
    monkeypatch.setattr(test_checkpoint, "FLIPS", 10)
    folder = shutil.copytree(two_steps, tmp_path / "checkpoints")
    rng = np.random.default_rng(SEED)
    found = harmless = 0
    newest = folder / "step_000000020"
    for path in test_checkpoint.files_of(newest):
        content = path.read_bytes()
        for name, damage in test_checkpoint.each_fault(path, rng):
            damage()
            restored = test_checkpoint.restore(folder, template)
            if restored.step == 20:
                assert path.name == manifest.NAME, (path, name)
                test_checkpoint.assert_same(restored.state, test_checkpoint.make_state(20))
                harmless += 1
            else:
                assert path.name in restored.rejected[0]
                found += 1
            path.write_bytes(content)
    report(f"damaged files: {found}/{found} harmful faults found, {harmless} in white space")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB that can be filled, made read-only and enlarged."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_or_read_only(small_disk, tmp_path, report):
    """On a real file system of 400 kB, whose kernel says ENOSPC and EROFS."""
    state = {"w": np.random.default_rng(0).normal(size=12_000).astype(np.float32)}
    checkpoints = Checkpoints(small_disk / "c", keep=1)
    checkpoints.save(1, state)
    filler = small_disk / "filler"

    def fill():
        with filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)

    with pytest.raises(OSError, match="No space left"):
        fill()
    for step in (2, 3):
        with pytest.raises(CheckpointError, match=f"cannot save step {step} in .*: No space left"):
            checkpoints.save(step, state)
    assert Checkpoints(small_disk / "c").restore(state).step == 1
    filler.unlink()
    remount = ["mount", "-o"]
    subprocess.run([*remount, "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"cannot save step 4 in .*: Read-only file system"):
        checkpoints.save(4, state)
    assert Checkpoints(small_disk / "c").restore(state).step == 1
    subprocess.run([*remount, "remount,rw", str(small_disk)], check=True)
    checkpoints.save(5, state)
    assert Checkpoints(small_disk / "c").restore(state).step == 5
    report("full and read-only disk: 3/3 refused in one line, old step kept, saved when free")


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(zygote, reference, small_disk, report):
    folder = small_disk  # so that the log of its phases is elsewhere
    filler = small_disk / "filler"
    for room in (20_000, 60_000, 100_000):
        filler.unlink(missing_ok=True)
        used = sum(path.stat().st_blocks * 512 for path in small_disk.rglob("*"))
        filler.write_bytes(b"x" * (400_000 - used - room))
        run = zygote.start(folder)
        assert run.wait() == 1, room
        assert run.lines()[-1].startswith("error: ")
        assert "No space left on device" in run.lines()[-1]
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    zygote.finish(folder)
    assert_same_outcome(folder, reference)
    report("run on a full disk: 3/3 ended with one line, the fourth went on to the same end")
