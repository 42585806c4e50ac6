"""One run's folder: its configuration, its checkpoints, its result."""

import contextlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from experiments.runtime import files, hosts
from experiments.training.saving import Saving
from lpa_jax import multihost
from lpa_jax.checkpoints import manifest
from lpa_jax.checkpoints.checkpoints import Checkpoints, Restored, Totals, differences
from lpa_jax.files import hold

RESULT = "result.json"
CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
MEASURED = "measured"  # a folder of what `landscape` and `layer_sweep` found of the model


class Names(NamedTuple):
    """What the files of a run are called: results that reports count have the usual names."""

    config: str = CONFIG
    result: str = RESULT


USUAL = Names()


def finished_result(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    names: Names = USUAL,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any] | None:
    """The result of an earlier run in this folder, or None if it is missing or incomplete.

    Args:
      folder: of the run.
      config: of the run.
      names: of its files.
      say: called with a line for a file that is there and cannot be read.

    Raises:
      ValueError: the folder holds a run with another configuration; names what differs.
    """
    earlier = files.read_or_say(folder / names.config, say)
    if earlier is None:
        return None
    check_same_run(folder, earlier, config)
    result = files.read_or_say(folder / names.result, say)
    return result if isinstance(result, dict) and result.get("complete") else None


def check_same_run(folder: pathlib.Path, earlier: Any, config: Mapping[str, Any]) -> None:
    """Raises ValueError, naming what differs, unless both configurations are the same."""
    if earlier != config:
        differing = ", ".join(differences(earlier, config))
        raise ValueError(
            f"--workdir: {folder} holds a run with other settings ({differing}); "
            "choose another --workdir"
        )


def check_inside(workdir: pathlib.Path, folder: pathlib.Path) -> None:
    """Raises ValueError if a symbolic link leads from a run's folder out of the workdir."""
    if not folder.resolve().is_relative_to(workdir.resolve()):
        raise ValueError(f"--workdir: {folder} leads out of {workdir} through a symbolic link")


def held(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other processes out of a folder; the first host does, for all hosts.

    Raises:
      lpa_jax.files.LockedError: another process holds it, on entry.
    """
    return hold(folder) if multihost.is_first_host() else contextlib.nullcontext()


class RunFolder:
    """What a run reads from and writes to its folder; without a path, nothing."""

    def __init__(
        self,
        path: pathlib.Path | None,
        config: Mapping[str, Any],
        saving: Saving,
        names: Names = USUAL,
    ):
        self._path, self._config, self._saving, self._names = path, config, saving, names
        self._checkpoints = None
        if path is not None:
            self._checkpoints = Checkpoints(
                path / CHECKPOINTS,
                config=config,
                keep=saving.keep,
                is_writer=multihost.is_first_host(),
            )

    def result(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """The result if the run has finished; every process must ask.

        `say` gets a line for a file that is cut short.

        Raises:
          ValueError: the folder holds a run with another configuration.
          hosts.DifferingHostsError: other processes say otherwise, or ask about another run.
        """
        if self._path is None:
            return None
        result = finished_result(self._path, self._config, self._names, say)
        found = hosts.UNFINISHED if result is None else hosts.FINISHED
        hosts.check(self._path, self._config, found)
        # A kill may have come between the result and the end of the checkpoints.
        if result is not None and not result.get("checkpoints_kept", True):
            self._checkpoints.remove()
        return result

    def begin(self, state: Any, say: Callable[[str], None]) -> Restored:
        """Where to go on from: the newest intact checkpoint, or the state as it is.

        Every process must ask; all get the same step of the same run, or all get an error.

        Raises:
          CheckpointError: there are checkpoints, but none is intact.
          ValueError: they are of a run with another configuration.
          hosts.DifferingHostsError: processes would not go on from the same.
        """
        fresh = Restored(0, state, None, {}, ())
        if self._path is None:
            return fresh
        restored = self._checkpoints.restore(state) or fresh
        hosts.check(self._path, self._config, restored.step, restored.digest, restored.rejected)
        for line in restored.rejected:
            say(line)
        files.write_json(self._path / self._names.config, self._config)
        return restored

    def save(self, state: Any, totals: Totals, notes: Mapping[str, Any]) -> None:
        """Saves a checkpoint.

        Raises:
          CheckpointError: it cannot be written.
        """
        if self._checkpoints is not None:
            self._checkpoints.save(int(state.step), state, totals, notes)

    def score(self, state: Any, accuracy: float, notes: Mapping[str, Any]) -> None:
        """Says how good a state is at the end of an epoch, so that the best checkpoint is kept.

        If nothing was better and the best is to outlive the run, it is saved: the interval alone
        would keep the best of the states that it happened to save.

        Raises:
          CheckpointError: it cannot be written.
        """
        if self._checkpoints is None:
            return
        step = int(state.step)
        self._checkpoints.score(step, accuracy)
        if self._saving.keep_finished and self._checkpoints.is_best(step):
            self.save(state, None, notes)

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the result; checkpoints go unless they are wanted. Returns it as plain values."""
        result = files.plain(
            {
                **result,
                "environment": files.environment(),
                "checkpoints_kept": self._saving.keep_finished,
            }
        )
        if self._path is not None:
            files.write_json(self._path / self._names.result, result)
            if not self._saving.keep_finished:
                if self._checkpoints.steps():  # a power cut must not take both
                    manifest.flush_to_disk(self._path)
                self._checkpoints.remove()
        return result
