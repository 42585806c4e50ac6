"""Checkpoints: whole, verified, and enough to resume bit for bit.

    folder/step_000000120/arrays/...       the state's arrays, written by Orbax
    folder/step_000000120/manifest.json    SHA-256 of every file, configuration, notes

A checkpoint is written under another name and renamed when its last file, the manifest, is there;
it is deleted by renaming it first. So a folder `step_*` was complete once, whenever a process was
killed, and one that is not what its manifest says has been damaged since: `restore` names it, goes
back to the one before, and deletes nothing.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lpa_jax import checks, metrics
from lpa_jax.checkpoints import arrays as array_files
from lpa_jax.checkpoints import manifest
from lpa_jax.checkpoints.manifest import DamagedError, Manifest

Totals = Mapping[str, metrics.Pair]

_ARRAYS = "arrays"
_NAME = re.compile(r"step_(\d{9,})")
_UNFINISHED = ".unfinished"
_DAMAGED = ".damaged"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none can be read; one line that says why."""


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
      step: Steps completed.
      state: The state, bit for bit.
      totals: Sums of the training metrics since the epoch began, as `trainer.train` takes them.
      notes: The notes it was saved with.
      rejected: One line for each newer checkpoint that was damaged.
      digest: Digest of all that the checkpoint holds, to tell whether several hosts read the same.
    """

    step: int
    state: Any
    totals: Totals | None
    notes: Mapping[str, Any]
    rejected: tuple[str, ...]
    digest: str = ""


class Checkpoints:
    """The checkpoints of one run in one folder.

    Not for two processes at once: use `files.hold`. With several hosts the state is the same
    on each, so one of them writes and all read.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     checkpoints = Checkpoints(folder, config={"seed": 0})
      ...     checkpoints.save(3, {"w": jnp.ones(2)}, notes={"seconds": 1.5})
      ...     restored = Checkpoints(folder, config={"seed": 0}).restore({"w": jnp.zeros(2)})
      >>> restored.step, restored.state["w"].tolist(), restored.notes
      (3, [1.0, 1.0], {'seconds': 1.5})
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        config: Mapping[str, Any] | None = None,
        keep: int = 2,
        is_writer: bool = True,
    ):
        """Opens a folder, which need not exist; nothing is written yet.

        Args:
          folder: Folder of the checkpoints.
          config: What decides the run's result, as JSON values; `restore` refuses another one.
          keep: How many of the newest checkpoints to keep, >= 1; the best one is kept besides.
          is_writer: Whether this process writes; the others only read.

        Raises:
          ValueError: Keep < 1, or the folder is a symbolic link.
        """
        checks.integer("keep", keep, 1)
        self._folder = pathlib.Path(folder).absolute()
        if self._folder.is_symlink():
            raise ValueError(f"folder must not be a symbolic link: {self._folder}")
        checks.instance("config", {} if config is None else config, Mapping, "a dictionary")
        self._config = _as_stored("config", config or {})
        self._keep = keep
        self._is_writer = is_writer
        self._scores: dict[int, float] = {}
        self._intact: set[int] = set()
        self._damaged: set[int] = set()

    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending, intact or not."""
        if not self._folder.is_dir():
            return []
        matches = ((_NAME.fullmatch(entry.name), entry) for entry in self._folder.iterdir())
        return sorted(int(m[1]) for m, entry in matches if m and not entry.is_symlink())

    def best(self) -> int | None:
        """The step with the highest score among the checkpoints, the first of equals."""
        scored = [step for step in self.steps() if step in self._scores]
        return max(scored, key=self._scores.__getitem__, default=None)

    def is_best(self, step: int) -> bool:
        """Whether a step has the highest score of all, saved or not, and the first of equals."""
        return bool(self._scores) and step == max(self._scores, key=self._scores.__getitem__)

    def save(
        self,
        step: int,
        state: Any,
        totals: Totals | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a checkpoint, then deletes those that are neither new nor best.

        A step that this object has saved or restored is not written again.

        Args:
          step: Steps completed.
          state: A pytree of arrays and keys.
          totals: (sum, count) pairs of the epoch so far.
          notes: JSON values.

        Raises:
          CheckpointError: It cannot be written; the earlier ones are kept.
        """
        step = checks.integer("step", step, 0)
        if not self._is_writer or step in self._intact:
            return
        notes = {} if notes is None else notes
        for name, given in (("totals", totals or {}), ("notes", notes)):
            checks.instance(name, given, Mapping, "a dictionary")
        arrays = array_files.flatten("state", state) | array_files.flatten(
            "totals", dict(totals or {})
        )
        path = self._path(step)
        unfinished = path.with_name(path.name + _UNFINISHED)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            self._set_damaged_aside()
            if path.exists():
                raise FileExistsError(f"{path.name} is there, but was not restored")
            unfinished.mkdir()
            array_files.write(unfinished / _ARRAYS, arrays)
            files = manifest.hash_files(unfinished, to_disk=True)
            scores = {str(scored): score for scored, score in self._scores.items()}
            manifest.write(unfinished, Manifest(step, self._config, notes, scores, files))
            manifest.flush_to_disk(unfinished)
            unfinished.rename(path)
            manifest.flush_to_disk(self._folder)
        # TensorStore reports a full disk as ValueError, other libraries with their own types.
        except Exception as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            kept = [f"step {earlier}" for earlier in self.steps()] or ["none"]
            raise CheckpointError(
                f"cannot save step {step} in {self._folder}: {array_files.reason(error)} "
                f"(checkpoints there: {', '.join(kept)})"
            ) from error
        self._intact.add(step)
        self._retire()

    def score(self, step: int, value: float) -> None:
        """Says how good the state of a step is: higher is better, not finite is not a score."""
        step = checks.integer("step", step, 0)
        if math.isfinite(checks.real(value)):
            self._scores[step] = float(value)
            if self._is_writer:
                self._retire()

    def restore(self, template: Any) -> Restored | None:
        """The newest intact checkpoint, or None where there never was one.

        Args:
          template: A state of the same structure, shapes and types; its values are not read.

        Raises:
          CheckpointError: There are checkpoints, but none is intact.
          ValueError: The newest intact one belongs to another configuration or another state; the
            message names what differs.
        """
        rejected = []
        for step in reversed(self.steps()):
            path = self._path(step)
            try:
                record = manifest.verify(path)
                if record.step != step:
                    raise DamagedError(f"it holds step {record.step}")
                self._check_config(record.config)
                arrays = _read_arrays(path / _ARRAYS)
            except (DamagedError, OSError) as fault:
                rejected.append(f"checkpoint {path.name} is not used: {fault}")
                self._damaged.add(step)
                continue
            self._intact.add(step)
            self._scores = {int(scored): score for scored, score in record.scores.items()}
            state = array_files.unflatten("state", template, arrays)
            return Restored(
                step, state, _totals(arrays), record.notes, tuple(rejected), record.digest()
            )
        if rejected:
            raise CheckpointError(
                f"no checkpoint in {self._folder} is intact; to start over, remove the folder "
                f"({'; '.join(rejected)})"
            )
        return None

    def remove(self) -> None:
        """Deletes all checkpoints of a run that has finished, but none that was found damaged."""
        if not self._is_writer or not self._folder.is_dir():
            return
        for step in set(self.steps()) - self._damaged:
            self._delete(step)
        self._remove_unfinished()
        with contextlib.suppress(OSError):  # damaged ones are still there
            self._folder.rmdir()
        self._intact.clear()

    def _path(self, step: int) -> pathlib.Path:
        return self._folder / f"step_{step:09d}"

    def _retire(self) -> None:
        """Deletes what is neither among the newest nor best; a damaged one is neither."""
        steps = [step for step in self.steps() if step not in self._damaged]
        if not self._intact.intersection(steps):
            return
        for step in set(steps[: -self._keep]) - {self.best(), max(self._intact)}:
            self._delete(step)

    def _delete(self, step: int) -> None:
        path = self._path(step)
        doomed = path.with_name(path.name + _UNFINISHED)
        path.rename(doomed)
        shutil.rmtree(doomed)
        self._intact.discard(step)

    def _remove_unfinished(self) -> None:
        for entry in self._folder.iterdir():
            if _NAME.fullmatch(entry.name.removesuffix(_UNFINISHED)) and (
                entry.name.endswith(_UNFINISHED) and not entry.is_symlink()
            ):
                shutil.rmtree(entry)

    def _set_damaged_aside(self) -> None:
        """Frees the names of damaged checkpoints, once there is an intact one to go back to."""
        for step in self._damaged if self._intact else ():
            path = self._path(step)
            number = 1
            while (aside := path.with_name(f"{path.name}{_DAMAGED}{number}")).exists():
                number += 1
            path.rename(aside)
        self._damaged.clear()

    def _check_config(self, config: Mapping[str, Any]) -> None:
        differing = differences(config, self._config)
        if differing:
            raise ValueError(
                f"{self._folder} holds checkpoints of a run with other settings "
                f"({', '.join(differing)})"
            )


def every_steps(count: int) -> Callable[[int], bool]:
    """A schedule, steps completed -> whether to save: after each `count` steps.

    Example:
      >>> [step for step in range(1, 8) if every_steps(3)(step)]
      [3, 6]
    """
    checks.integer("count", count, 1)
    return lambda step: step % count == 0


def every_seconds(
    seconds: float, clock: Callable[[], float] = time.monotonic
) -> Callable[[int], bool]:
    """A schedule: at the first step that ends `seconds` or more after the last save.

    Example:
      >>> due = every_seconds(10, clock=iter([0, 4, 11, 20, 21]).__next__)
      >>> [due(step) for step in range(1, 5)]
      [False, True, False, True]
    """
    checks.number("seconds", seconds, open_low=True)
    last = clock()

    def due(step: int) -> bool:
        nonlocal last
        now = clock()
        if now - last < seconds:
            return False
        last = now
        return True

    return due


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two configurations, by the innermost name.

    Example:
      >>> differences({"a": {"radius": 1, "steps": 3}}, {"a": {"radius": 2, "steps": 3}})
      ['radius: 1 there, 2 here']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(set(old) | set(new))
        return [d for key in keys for d in differences(old.get(key), new.get(key), key)]
    return [] if old == new else [f"{name}: {old} there, {new} here"]


def _as_stored(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as a checkpoint gives them back: tuples are lists, keys are text."""
    try:
        return json.loads(json.dumps(dict(values), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be what JSON can hold, got {values!r} ({error})") from None


def _read_arrays(folder: pathlib.Path) -> array_files.Arrays:
    try:
        return array_files.read(folder)
    except Exception as error:
        reason = array_files.reason(error)
        raise DamagedError(f"Orbax cannot read its arrays: {reason}") from error


def _totals(arrays: Mapping[str, np.ndarray]) -> Totals | None:
    """Metric -> (sum, count) from `totals/METRIC/0` and `/1`; None before the first step."""
    names = [name.removesuffix("/0") for name in arrays if re.fullmatch("totals/.*/0", name)]
    return {
        name.removeprefix("totals/"): tuple(jnp.asarray(arrays[f"{name}/{i}"]) for i in range(2))
        for name in names
    } or None
