"""Progress of several runs: a bar on a terminal, plain lines elsewhere, nothing if quiet."""

import datetime
import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from lpa_jax import metrics
from lpa_jax.training.loop import EpochRecord, Totals

# The bar fits into 80 columns, of which the status takes up to 40.
_NAME_WIDTH, _BAR_WIDTH = 16, 5
# Seconds between the plain lines of a run, where there is no terminal.
_LINE_EVERY = 30.0
# Seconds between reads of the metrics within an epoch, each of which waits for the devices.
_LOOK_EVERY = 10.0


class RunProgress:
    """Shows the progress of a series of runs on standard error.

    Args:
      num_runs: number of runs.
      epochs: length of each run.
      quiet: whether to show nothing.
      console: where to show it; standard error if None.
    """

    def __init__(
        self, num_runs: int, epochs: int, quiet: bool = False, console: Console | None = None
    ):
        self._num_runs, self._epochs, self._quiet = num_runs, epochs, quiet
        self._console = console or Console(stderr=True, highlight=False)
        self._live = not quiet and self._console.is_terminal
        self._done = 0
        self._bar = self._task = None

    def __enter__(self) -> "RunProgress":
        if self._live:
            self._bar = Progress(
                TextColumn(
                    "{task.description}",
                    markup=False,
                    table_column=Column(max_width=_NAME_WIDTH, no_wrap=True, overflow="ellipsis"),
                ),
                BarColumn(bar_width=_BAR_WIDTH),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}", table_column=Column(no_wrap=True)),
                console=self._console,
            )
            self._bar.start()
            total = self._num_runs * self._epochs
            self._task = self._bar.add_task("starting", total=total, status="")
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._live:
            self._bar.console.print(line)
        elif not self._quiet:
            print(line, file=sys.stderr, flush=True)

    def start(self, name: str) -> None:
        """Starts to show a run of this name."""
        self._name, self._started, self._first = name, time.perf_counter(), None
        self._last_line = self._last_look = self._started
        self._seen = 0.0
        if self._live:
            self._bar.update(self._task, description=name, status="compiling")

    def step(self, step: int, epochs: float, totals: Totals) -> None:
        """Shows a step within an epoch, at most every few seconds.

        Args:
          step: number of steps of the run so far.
          epochs: the same in epochs.
          totals: sums of the training metrics since the epoch began.
        """
        if self._first is None:
            self._first = epochs  # a resumed run does not begin at 0
        if self._quiet or time.perf_counter() - self._last_look < _LOOK_EVERY:
            return
        examples = float(totals["loss"][1])
        now = time.perf_counter()
        # Fewer than at the last read: another epoch has begun.
        new = examples - self._seen if examples > self._seen else examples
        rate = new / (now - self._last_look)
        self._seen, self._last_look = examples, now
        self._show(step, epochs, metrics.compute(totals), rate)

    def epoch(self, record: EpochRecord) -> None:
        """Shows a finished epoch of the current run."""
        if self._first is None:
            self._first = record.epoch - 1
        self._last_look, self._seen = time.perf_counter(), 0.0
        self._show(record.step, record.epoch, record.train, record.examples_per_second)

    def _show(self, step: int, epochs: float, train: Mapping[str, float], rate: float) -> None:
        status = (
            f"step {step} loss {train['loss']:.3f} acc {100 * train['accuracy']:.0f}% "
            f"{_rounded(rate)} img/s"
        )
        if self._live:
            done = self._done * self._epochs + epochs
            self._bar.update(self._task, completed=done, status=status)
        elif epochs > self._first and self._last_look - self._last_line >= _LINE_EVERY:
            took = (self._last_look - self._started) / (epochs - self._first)
            left = datetime.timedelta(seconds=round(took * (self._epochs - epochs)))
            self.say(f"{self._name}: epoch {epochs:.4g}/{self._epochs} {status}, {left} left")
            self._last_line = self._last_look

    def finish(self, outcome: str) -> None:
        """Ends the current run and prints a line with its outcome."""
        self._done += 1
        seconds = time.perf_counter() - self._started
        self.say(f"[{self._done}/{self._num_runs}] {self._name}: {outcome} ({seconds:.1f} s)")
        if self._live:
            self._bar.update(self._task, completed=self._done * self._epochs)


def _rounded(number: float) -> str:
    """The number in three or four characters: 846, 12k."""
    return f"{number:.0f}" if number < 1000 else f"{number / 1000:.0f}k"
