"""Progress of several runs: two lines on a terminal, plain lines elsewhere, nothing if quiet."""

import datetime
import sys
import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from lpa_jax import metrics
from lpa_jax.training.loop import EpochRecord, Totals

# Seconds between the plain lines of a run, where there is no terminal.
_LINE_EVERY = 30.0
# Seconds between reads of the metrics within an epoch, each of which waits for the devices.
_LOOK_EVERY = 10.0


class RunProgress:
    """Shows the progress of a series of runs on standard error.

    A terminal has a line for the whole job, with a bar, and one for the run.

    Args:
      num_runs: number of runs.
      length: of each run, in units.
      quiet: whether to show nothing.
      console: where to show it; standard error if None.
      unit: what the length counts.
    """

    def __init__(
        self,
        num_runs: int,
        length: int,
        quiet: bool = False,
        console: Console | None = None,
        unit: str = "epoch",
    ):
        self._num_runs, self._length, self._unit = num_runs, length, unit
        self._quiet = quiet
        self._console = console or Console(stderr=True, highlight=False)
        self._done = 0
        self._live: Live | None = None

    def __enter__(self) -> "RunProgress":
        self._worked = 0.0
        if not self._quiet and self._console.is_terminal:
            self._began = time.perf_counter()
            self._lines = _lines(self._num_runs)
            self._live = Live(Group(*self._lines), console=self._console, transient=True)
            self._live.start()
            self._update(0, status=f"run 1/{self._num_runs}")
        return self

    def __exit__(self, *exception) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """Prints a line above the bars."""
        if self._live is not None:
            self._live.console.print(line, markup=False)
        elif not self._quiet:
            print(line, file=sys.stderr, flush=True)

    def start(self, name: str) -> None:
        """Starts to show a run of this name."""
        self._name, self._started, self._first = name, time.perf_counter(), None
        self._last_line = self._last_look = self._started
        self._seen = 0.0
        if self._live is not None:
            self._update(1, name=name, status="starting")

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
        self._show(epochs, _status(metrics.compute(totals), rate))

    def epoch(self, record: EpochRecord) -> None:
        """Shows a finished epoch of the current run."""
        if self._first is None:
            self._first = record.epoch - 1
        self._last_look, self._seen = time.perf_counter(), 0.0
        self._show(record.epoch, _status(record.train, record.examples_per_second))

    def part(self, number: int, what: str) -> None:
        """Shows what is being done, after `number` parts of the current run."""
        self._first = self._first or 0
        self._last_look = time.perf_counter()
        self._show(number, what)

    def _show(self, done: float, status: str) -> None:
        took = self._last_look - self._started
        left = ""
        if done > self._first:
            left = f"{_clock(took / (done - self._first) * (self._length - done))} left"
        place = f"{self._unit} {done:.4g}/{self._length}"
        if self._live is not None:
            self._update(1, status="  ".join(filter(None, (place, status, left))))
            runs = self._worked + (done - self._first) / self._length
            whole = self._done + done / self._length
            job = f"run {self._done + 1}/{self._num_runs}"
            if runs > 0:
                elapsed = self._last_look - self._began
                job += f"  {_clock(elapsed / runs * (self._num_runs - whole))} left"
            self._update(0, status=job, completed=whole)
        elif done > self._first and self._last_look - self._last_line >= _LINE_EVERY:
            run = f"[{self._done + 1}/{self._num_runs}] {self._name}"
            self.say(f"{run}: {place}, {status.replace('  ', ', ')}, {left}")
            self._last_line = self._last_look

    def _update(self, line: int, **fields) -> None:
        self._lines[line].update(self._lines[line].task_ids[0], **fields)

    def finish(self, outcome: str) -> None:
        """Ends the current run and prints a line with its outcome."""
        self._done += 1
        self._worked += 1 - (self._first or 0) / self._length
        seconds = time.perf_counter() - self._started
        self.say(f"[{self._done}/{self._num_runs}] {self._name}: {outcome} ({seconds:.1f} s)")
        if self._live is not None:
            number = min(self._done + 1, self._num_runs)
            self._update(0, status=f"run {number}/{self._num_runs}", completed=self._done)


def _lines(total: int) -> list[Progress]:
    """The line of the job, with a bar that takes what the text leaves, and the line of the run."""
    name = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    lines = [
        (TextColumn("all runs"), BarColumn(None), _text("status", Column(no_wrap=True))),
        (_text("name", name), _text("status", Column(no_wrap=True))),
    ]
    made = [Progress(*columns, expand=True) for columns in lines]
    for line in made:
        line.add_task("", total=total, name="", status="")
    return made


def _text(field: str, column: Column) -> TextColumn:
    return TextColumn(f"{{task.fields[{field}]}}", markup=False, table_column=column)


def _status(train: Mapping[str, float], rate: float) -> str:
    return (
        f"loss {train['loss']:.3f}  acc {100 * train['accuracy']:.0f} %  {_rounded(rate)} images/s"
    )


def _rounded(number: float) -> str:
    """The number in three or four characters: 846, 12k."""
    return f"{number:.0f}" if number < 1000 else f"{number / 1000:.0f}k"


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
