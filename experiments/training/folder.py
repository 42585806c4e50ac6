"""The folder of a run: its configuration, its checkpoints and its result."""

import contextlib
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.runtime import files, hosts, schema
from experiments.runtime.schema import ANY, NUMBER, OBJECT, TEXT, WHOLE, YES_OR_NO
from experiments.training.saving import Saving
from lpa_jax import multihost
from lpa_jax.checkpoints import manifest
from lpa_jax.checkpoints.checkpoints import Checkpoints, Restored, Totals, differences
from lpa_jax.files import hold
from lpa_jax.training.loop import NonFiniteLossError

RESULT = "result.json"
CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
OUTCOME = "outcome.json"  # how a job of a sweep ended, or a run that failed
DATA = "data"  # in a configuration: digests of what the run is trained and evaluated on
MEASURED = "measured"  # a folder with what `landscape` and `layer_sweep` measured


LOGS = "logs.json"  # SHA-256 of the logs of a finished run
SHARES = {...: (schema.SHARE, None)}
_ROW = {"epoch": WHOLE, "classes/*": [(NUMBER, None)], ...: (NUMBER, None)}
CURVE = [_ROW, ...]
CONFIG_SCHEMA = {
    "method": TEXT,
    "seed": WHOLE,
    "options?": (OBJECT, None),
    "settings?": (
        {
            **dict.fromkeys(("title?", "dataset?", "profile?", "model?", "evaluate_on?"), TEXT),
            "imbalance?": NUMBER,
            ...: ANY,
        },
        None,
    ),
    "title?": TEXT,
    "test_domain?": (TEXT, None),
    "data?": (OBJECT, None),
    ...: ANY,
}
# Fields that only one protocol has may be missing.
RESULT_SCHEMA = {
    "complete?": YES_OR_NO,
    "method?": TEXT,
    "seed?": WHOLE,
    "accuracy?": (schema.SHARE, None),
    "seconds?": (NUMBER, None),
    "group_accuracy?": (SHARES, None),
    "per_class_accuracy?": ([(schema.SHARE, None)], None),
    "train_counts?": ([WHOLE], None),
    "curve?": (CURVE, None),
    "selections?": (SHARES, None),
    "evaluated_on?": TEXT,
    "test_domain?": (TEXT, None),
    "options?": (OBJECT, None),
    "environment?": (OBJECT, None),
    "checkpoints_kept?": YES_OR_NO,
    ...: ANY,
}
# What a checkpoint notes of its run.
_NOTES = {"rows?": [_ROW | {"step": WHOLE, "epoch?": WHOLE}], "seconds?": NUMBER, ...: ANY}
_MEASURED = {"settings": OBJECT, "measured": OBJECT, "digest?": TEXT}


class Names(NamedTuple):
    """The names of a run's files, and what its result holds. Reports read the usual ones."""

    config: str = CONFIG
    result: str = RESULT
    schema: Any = RESULT_SCHEMA


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
      say: called with a line for a file that cannot be read.

    Raises:
      ValueError: the folder holds a run with another configuration; the message names what differs.
    """
    earlier = schema.read_or_say(folder / names.config, OBJECT, say)
    if earlier is None:
        return None
    check_same_run(folder, earlier, as_recorded(folder, config, names))
    result = schema.read_or_say(folder / names.result, names.schema, say)
    if result is None or not result.get("complete"):
        return None
    found = disagreement(config, result)
    if found is not None:
        say(f"{folder / names.result}: {found}: it will be written again")
    return result if found is None else None


def disagreement(config: Mapping[str, Any], result: Mapping[str, Any]) -> str | None:
    """What in a result does not fit its configuration or the rest of it; None if all does."""
    for name in ("method", "seed", "train_counts"):
        if None not in (config.get(name), result.get(name)) and config[name] != result[name]:
            return f"{name} is {config[name]!r} in {CONFIG}, {result[name]!r} in {RESULT}"
    by_class = [(name, result.get(name)) for name in ("train_counts", "per_class_accuracy")]
    by_class += [item for row in result.get("curve") or () for item in row.items()]
    sizes = [(name, len(values)) for name, values in by_class if isinstance(values, list)]
    for name, size in sizes:
        if size != sizes[0][1]:
            return f"{sizes[0][0]} and {name} of {RESULT} differ in length"
    return None


def as_recorded(
    folder: pathlib.Path, config: Mapping[str, Any], names: Names = USUAL
) -> dict[str, Any]:
    """The configuration of a run as its folder would hold it.

    The folders of the first release say nothing of the data that a run was trained on: there,
    nothing of it can be compared.
    """
    earlier = files.read_json(folder / names.config)
    is_old = isinstance(earlier, dict) and DATA not in earlier
    return {name: value for name, value in config.items() if not (is_old and name == DATA)}


def check_same_run(
    folder: pathlib.Path, earlier: Any, config: Mapping[str, Any], what: str = "a run"
) -> None:
    """Refuses a folder that holds something else.

    Args:
      folder: of the run.
      earlier: the configuration in it.
      config: of the run.
      what: what the folder holds.

    Raises:
      ValueError: the configurations differ; the message names in what.
    """
    if earlier == config:
        return
    differing = ", ".join(differences(earlier, config))
    others = {**earlier, DATA: None} if isinstance(earlier, dict) else None
    kind = "on other data" if others == {**config, DATA: None} else "with other settings"
    raise ValueError(
        f"--workdir: {folder} holds {what} {kind} ({differing}); choose another --workdir"
    )


def record_failure(folder: pathlib.Path, reason: str) -> None:
    """Leaves the reason for which a run has no result; a report lists it."""
    files.write_json(folder / OUTCOME, {"exit_status": 1, "last_line": reason})


def failures_error(failed: Sequence[str], num_runs: int) -> NonFiniteLossError:
    """The error of a comparison of which some runs failed, for which `record_failure` was called.

    Args:
      failed: what failed, a line for each run.
      num_runs: number of runs of the comparison.
    """
    others = "" if len(failed) == num_runs else "; the table holds the others"
    return NonFiniteLossError(f"{len(failed)} of {num_runs} runs failed: {failed[0]}{others}")


def log_digests(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of the logs in the folder of a run, by name."""
    logs = [path for path in folder.iterdir() if re.match(r"metrics\.jsonl|events\.", path.name)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(logs)}


def write_measured(path: pathlib.Path, settings: Any, measured: Any) -> None:
    """Writes what was measured with some settings, as plain values, with a digest of itself."""
    content = {"settings": settings, "measured": measured}
    files.write_json(path, content | {"digest": _digest(content)})


def read_measured(path: pathlib.Path) -> dict[str, Any] | None:
    """What `write_measured` wrote; None if there is no file.

    Raises:
      ValueError: naming the file, if it has changed since.
    """
    content = schema.read(path, _MEASURED)
    if content is not None and content.pop("digest", None) != _digest(content):
        raise ValueError(f"{path} has changed since it was written, or has no digest")
    return content


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_inside(workdir: pathlib.Path, folder: pathlib.Path) -> None:
    """Raises ValueError if a symbolic link leads from a run's folder out of the workdir."""
    if not folder.resolve().is_relative_to(workdir.resolve()):
        raise ValueError(f"--workdir: {folder} leads out of {workdir} through a symbolic link")


def held(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Locks a folder against other processes; the first host locks it for all hosts.

    Raises:
      lpa_jax.files.LockedError: another process holds it, on entry.
    """
    return hold(folder) if multihost.is_first_host() else contextlib.nullcontext()


class RunFolder:
    """What a run reads from and writes to its folder.

    Args:
      path: of the folder; None reads and writes nothing.
      config: everything that decides the result, as plain values.
      saving: when to save checkpoints, and how many to keep.
      names: of the files.
    """

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
            self._config = config = as_recorded(path, config, names)
            self._checkpoints = Checkpoints(
                path / CHECKPOINTS,
                config=config,
                keep=saving.keep,
                is_writer=multihost.is_first_host(),
            )

    def result(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """The result of a finished run, or None. Every process must call this.

        Args:
          say: called with a line for a file that cannot be read.

        Raises:
          ValueError: the folder holds a run with another configuration.
          hosts.DifferingHostsError: the processes find different things, or run different things.
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
        """The newest intact checkpoint, or `state` if there is none. Every process must call this.

        All processes get the same step of the same run, or all of them raise.

        Args:
          state: the state before the first step.
          say: called with a line for each damaged checkpoint.

        Raises:
          CheckpointError: there are checkpoints, but none is intact.
          ValueError: they are of a run with another configuration.
          hosts.DifferingHostsError: the processes would not start from the same state.
        """
        fresh = Restored(0, state, None, {}, ())
        if self._path is None:
            return fresh
        restored = self._checkpoints.restore(state) or fresh
        hosts.check(self._path, self._config, restored.step, restored.digest, restored.rejected)
        found = schema.problem(restored.notes, _NOTES)
        if found is not None:
            step = f"step {restored.step} in {self._path / CHECKPOINTS}"
            raise ValueError(f"--workdir: {step} is of another program: {found}")
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
        """Records the accuracy of a state at the end of an epoch, so that the best one is kept.

        If the best checkpoint is kept after the run, the best state so far is saved at once. The
        interval alone would keep the best among the states that it happened to save.

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
        """Writes the result and removes unwanted checkpoints; returns it as plain values."""
        result = files.plain(
            {
                **result,
                "environment": files.environment(),
                "checkpoints_kept": self._saving.keep_finished,
            }
        )
        if self._path is not None:
            files.write_json(self._path / LOGS, log_digests(self._path))
            files.write_json(self._path / self._names.result, result)
            if multihost.is_first_host():
                (self._path / OUTCOME).unlink(missing_ok=True)
            if not self._saving.keep_finished:
                if self._checkpoints.steps():  # a power cut must not take both
                    manifest.flush_to_disk(self._path)
                self._checkpoints.remove()
        return result
