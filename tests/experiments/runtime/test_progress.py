"""Progress: what a terminal of 80 columns shows, plain lines elsewhere, nothing if quiet."""

import io
import re

import pytest
from rich.console import Console

from experiments.runtime import progress
from experiments.runtime.progress import RunProgress
from lpa_jax.training.loop import EpochRecord

NAME = "manifold_mixup@input|hidden1 seed 0"
RECORD = EpochRecord(
    epoch=7, step=19200, train={"loss": 0.12345, "accuracy": 0.987}, evaluation=None, seconds=1.0,
    examples_per_second=12345.6,
)  # fmt: skip


def shown(console=None, quiet=False):
    with RunProgress(4, 60, quiet, console) as run:
        run.start(NAME)
        run.epoch(RECORD)
        run.say("a line of its own")
        run.finish("test accuracy 78.70 %")


@pytest.mark.parametrize("width", [80, 200])
def test_a_terminal_shows_the_job_with_a_bar_and_the_run_with_its_units_and_totals(width):
    out = io.StringIO()
    shown(Console(file=out, force_terminal=True, width=width, color_system=None))
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= width
    place = next(i for i, line in enumerate(lines) if "epoch" in line)
    job, run = lines[place - 1 : place + 1]
    assert job.startswith("all runs ") and re.search(r"run [12]/4( +\d:\d\d:\d\d left)?$", job)
    numbers = r"epoch 7/60  loss 0\.123  acc 99 %  12k images/s  \d:\d\d:\d\d left$"
    assert run.startswith("manifold_mixup") and re.search(numbers, run)
    assert (NAME in run) == (width == 200)
    assert "a line of its own" in lines


def test_measurements_are_shown_by_their_names(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_EVERY", -1.0)
    with RunProgress(2, 3, unit="measurement") as run:
        run.start("lpa seed 0")
        for number, what in enumerate(("flatness", "spectrum")):
            run.part(number, what)
        run.finish("measured")
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\[1/2\] lpa seed 0: measurement 1/3, spectrum, 0:00:00 left", first)
    assert last.startswith("[1/2] lpa seed 0: measured (")


def test_without_a_terminal_there_are_plain_lines_and_with_quiet_nothing(capsys):
    shown()
    out, err = capsys.readouterr()
    assert out == "" and "\x1b" not in err
    first, second = err.splitlines()
    assert first == "a line of its own"
    assert re.fullmatch(rf"\[1/4\] {re.escape(NAME)}: test accuracy 78\.70 % \(\d+\.\d s\)", second)
    shown(quiet=True)
    assert capsys.readouterr() == ("", "")


def test_a_run_that_lasts_says_where_it_is_without_a_terminal(capsys, monkeypatch):
    clock = iter([100.0, 110.0, 140.0, 150.0, 160.0])
    monkeypatch.setattr(progress.time, "perf_counter", clock.__next__)
    with RunProgress(4, 60) as run:
        run.start(NAME)
        for epoch in (7, 8, 9):  # at 10, 40 and 50 seconds; it was resumed after epoch 6
            run.epoch(RECORD._replace(epoch=epoch))
        run.finish("done")
    line, last = capsys.readouterr().err.splitlines()
    expected = "epoch 8/60, loss 0.123, acc 99 %, 12k images/s, 0:17:20 left"
    assert line == f"[1/4] {NAME}: {expected}" and last.endswith("done (60.0 s)")


def test_an_epoch_that_lasts_says_where_it_is(capsys, monkeypatch):
    clock = iter([100.0, 104.0, 111.0, 111.0, 134.0, 134.0, 140.0, 170.0, 170.0, 180.0])
    monkeypatch.setattr(progress.time, "perf_counter", clock.__next__)
    with RunProgress(4, 2) as run:
        run.start(NAME)
        for step, examples in ((1, 10.0), (2, 20.0), (25, 250.0)):
            # Looked at after 11 and 34 seconds, a line is due after 30.
            run.step(step, step / 100, {"loss": (2 * examples, examples), "accuracy": (0.0, 1.0)})
        run.epoch(RECORD._replace(epoch=1))
        run.step(125, 1.25, {"loss": (30.0, 300.0), "accuracy": (300.0, 300.0)})
        run.finish("done")
    first, second, last = capsys.readouterr().err.splitlines()
    start = f"[1/4] {NAME}: epoch"
    assert first == f"{start} 0.25/2, loss 2.000, acc 0 %, 10 images/s, 0:04:08 left"
    assert second == f"{start} 1.25/2, loss 0.100, acc 100 %, 10 images/s, 0:00:42 left"
    assert last.endswith("done (80.0 s)")


def test_quiet_looks_at_nothing(capsys):
    with RunProgress(1, 1, quiet=True) as run:
        run.start(NAME)
        run.step(1, 0.5, {"loss": None})
    assert capsys.readouterr() == ("", "")
