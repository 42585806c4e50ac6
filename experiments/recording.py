"""A run's log: JSON lines and TensorBoard events, one record an epoch."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tensorboardX import SummaryWriter

from experiments import files


class RunLog:
    """Writes scalars to `metrics.jsonl` and TensorBoard events; without a folder, nowhere.

    What an earlier, interrupted run left in the folder is replaced by `rows`: those of its records
    that the checkpoint holds from which this run goes on. So no epoch is there twice or not at all.

    Attributes:
      rows: all records so far, as plain values.
    """

    def __init__(self, folder: pathlib.Path | None, rows: Sequence[Mapping[str, Any]] = ()):
        self.rows = [dict(row) for row in rows]
        self._folder = folder
        self._lines = self._events = None

    def __enter__(self) -> "RunLog":
        if self._folder is not None:
            path = self._folder / "metrics.jsonl"
            files.write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
            for old in self._folder.glob("events.out.tfevents.*"):
                old.unlink()
            self._lines = path.open("a", encoding="utf-8")
            self._events = SummaryWriter(str(self._folder), flush_secs=30)
            for row in self.rows:
                self._add_events(row)
        return self

    def __exit__(self, *exception) -> None:
        if self._lines is not None:
            self._lines.close()
            self._events.close()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one record."""
        row = files.plain({**scalars, "step": step})
        self.rows.append(row)
        if self._lines is not None:
            self._lines.write(json.dumps(row) + "\n")
            self._lines.flush()
            self._add_events(row)

    def _add_events(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("step", "epoch") and value is not None:  # None: an empty group
                # TensorBoard takes no other characters; domains are called +90% and the like.
                tag = re.sub(r"[^\w./-]", "_", name)
                self._events.add_scalar(tag, value, row["step"])
