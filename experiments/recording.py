"""A run's log: JSON lines and TensorBoard events, one record an epoch."""

import json
import pathlib
from collections.abc import Mapping

from tensorboardX import SummaryWriter

from experiments import files


class RunLog:
    """Writes scalars to `metrics.jsonl` and TensorBoard events; without a folder, nowhere.

    An earlier, interrupted log in the same folder is replaced: the run starts over.
    """

    def __init__(self, folder: pathlib.Path | None):
        self._folder = folder
        self._lines = self._events = None

    def __enter__(self) -> "RunLog":
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in self._folder.glob("events.out.tfevents.*"):
                old.unlink()
            self._lines = (self._folder / "metrics.jsonl").open("w", encoding="utf-8")
            self._events = SummaryWriter(str(self._folder), flush_secs=30)
        return self

    def __exit__(self, *exception) -> None:
        if self._lines is not None:
            self._lines.close()
            self._events.close()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one record."""
        if self._lines is None:
            return
        self._lines.write(json.dumps(files.plain(scalars)) + "\n")
        self._lines.flush()
        for name, value in scalars.items():
            if name not in ("step", "epoch") and value == value:  # NaN: an empty group
                self._events.add_scalar(name, value, step)
