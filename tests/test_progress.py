"""Progress: what a terminal of 80 columns shows, plain lines elsewhere, nothing if quiet."""

import io
import re

from rich.console import Console

from experiments.progress import RunProgress
from lpa_jax.trainer import EpochRecord

NAME = "manifold_mixup@input|hidden1 seed 0"
RECORD = EpochRecord(
    epoch=7, step=19200, train={"loss": 0.12345, "accuracy": 0.987}, evaluation=None, seconds=1.0,
    examples_per_second=12345.6,
)  # fmt: skip


def shown(console=None, quiet=False):
    with RunProgress(4, 60, quiet, console) as progress:
        progress.start(NAME)
        progress.epoch(RECORD)
        progress.say("a line of its own")
        progress.finish("test accuracy 78.70 %")


def test_a_terminal_shows_step_loss_accuracy_speed_and_time_left_on_one_line_of_80_columns():
    out = io.StringIO()
    shown(Console(file=out, force_terminal=True, width=80, color_system=None))
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 80
    # On a busy machine the only frame may be that of the finished run, of 60 epochs.
    bars = [line for line in lines if "step" in line]
    assert bars and all(
        re.search(r"(7|60)/240 (-|\d+):[-\d:]+ step 19200 loss 0\.123 acc 99% 12k img/s", line)
        for line in bars[:1]
    ), bars
    assert bars[0].startswith("manifold_mixup@…")
    assert "a line of its own" in lines


def test_without_a_terminal_there_are_plain_lines_and_with_quiet_nothing(capsys):
    shown()
    out, err = capsys.readouterr()
    assert out == "" and "\x1b" not in err
    first, second = err.splitlines()
    assert first == "a line of its own"
    assert re.fullmatch(rf"\[1/4\] {re.escape(NAME)}: test accuracy 78\.70 % \(\d+\.\d s\)", second)
    shown(quiet=True)
    assert capsys.readouterr() == ("", "")
