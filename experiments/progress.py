"""Progress of several runs: a bar on a terminal, plain lines elsewhere, nothing if quiet."""

import datetime
import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from lpa_jax.trainer import EpochRecord

# Everything has to fit into 80 columns, of which the status takes up to 40.
_NAME_WIDTH, _BAR_WIDTH = 16, 5
# Seconds between the plain lines of a run that lasts, where there is no terminal.
_LINE_EVERY = 30.0


class RunProgress:
    """Shows how far a series of runs has come.

    Lines go to standard error, so that standard output holds the result alone.
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
        """One line above the bar."""
        if self._live:
            self._bar.console.print(line)
        elif not self._quiet:
            print(line, file=sys.stderr, flush=True)

    def start(self, name: str) -> None:
        """A run begins."""
        self._name, self._started, self._first_epoch = name, time.perf_counter(), None
        self._last_line = self._started
        if self._live:
            self._bar.update(self._task, description=name, status="compiling")

    def epoch(self, record: EpochRecord) -> None:
        """An epoch of the current run is over."""
        status = (
            f"step {record.step} loss {record.train['loss']:.3f} "
            f"acc {100 * record.train['accuracy']:.0f}% "
            f"{_rounded(record.examples_per_second)} img/s"
        )
        if self._live:
            done = self._done * self._epochs + record.epoch
            self._bar.update(self._task, completed=done, status=status)
            return
        now = time.perf_counter()
        if self._first_epoch is None:  # a run that goes on does not begin at 1
            self._first_epoch = record.epoch
        if now - self._last_line >= _LINE_EVERY:
            epochs = record.epoch - self._first_epoch + 1
            left = (now - self._started) / epochs * (self._epochs - record.epoch)
            self.say(
                f"{self._name}: epoch {record.epoch}/{self._epochs} {status}, "
                f"{datetime.timedelta(seconds=round(left))} left"
            )
            self._last_line = now

    def finish(self, outcome: str) -> None:
        """The current run is over."""
        self._done += 1
        seconds = time.perf_counter() - self._started
        self.say(f"[{self._done}/{self._num_runs}] {self._name}: {outcome} ({seconds:.1f} s)")
        if self._live:
            self._bar.update(self._task, completed=self._done * self._epochs)


def _rounded(number: float) -> str:
    """Three characters or four: 846, 12k."""
    return f"{number:.0f}" if number < 1000 else f"{number / 1000:.0f}k"
