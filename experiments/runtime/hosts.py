"""Experiments on many hosts: flags, equal findings, one plain line when a process is lost.

Each process reads checkpoints and results for itself. One that sees no checkpoint, or takes the
newest for damaged, would begin at another step than the others; their collectives would match all
the same, and average gradients of different parameters. So they compare what they found (`check`).

When a process dies or stops, JAX's runtime ends the others from C++, with a stack trace on standard
error and SIGABRT; no Python code runs. Therefore everything that C++ writes to standard error
passes through a small separate process (`runtime_log.py`). It outlives this one, passes all other
lines on, and prints one line that says what happened.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from experiments.runtime import console, fields, runtime_log
from experiments.runtime.fields import setting
from lpa_jax import multihost

FLAGS = flags.FLAGS
# How errors of collectives begin in the processes that are left.
LOST_SIGNS = ("Gloo", "coordination service", "CoordinationService", "NCCL", "UNAVAILABLE:")
# The runtime stops waiting this many seconds after --initialization_timeout, and may take six more
# and print a stack trace: the wait ends here first.
RUNTIME_PATIENCE = 30
INTERRUPTED = "interrupted: the same command resumes the run"
# In place of a checkpoint's step, before that is needed.
FINISHED, UNFINISHED = -1, -2
_RECORD = struct.Struct("<q32s32s")
_REMEDY = "--workdir must be on a file system that all hosts share"
LOST = "lost the connection to another process of the run, which died, stopped or cannot be reached"


@dataclasses.dataclass(frozen=True)
class Hosts:
    """How the processes of a run find each other; see `multihost.connect`."""

    GROUP: ClassVar[str] = "machines"

    coordinator_address: str | None = setting(
        None, "host:port of process 0, where the environment does not give it."
    )
    num_processes: int | None = setting(
        None, "Number of processes of the run, one on each host.", low=1, high=10**6
    )
    process_id: int | None = setting(None, "Index of this process, from 0.", low=0, high=10**6)
    initialization_timeout: int = setting(
        300, "Seconds to wait for the other processes to start.", low=1, high=10**6
    )
    heartbeat_timeout: int = setting(
        100, "Seconds of silence after which a process counts as dead.", low=1, high=10**6
    )


class DifferingHostsError(RuntimeError):
    """Processes of a run found different things; all raise it, before anything is written.

    The message is one line that names the processes and what each found.
    """


class Found(NamedTuple):
    """What a process found of a run.

    Attributes:
      step: of the checkpoint that it would resume from, 0 without any; or FINISHED, UNFINISHED.
      run: digest of what it is about to train.
      checkpoint: digest of that checkpoint.
    """

    step: int
    run: bytes
    checkpoint: bytes


def define_flags() -> None:
    """Defines the flags that join several processes to one run."""
    flags.DEFINE_bool(
        "multihost",
        False,
        "Join the processes of a TPU pod, Slurm or Open MPI job, which the environment describes.",
    )
    fields.place(Hosts.GROUP, "multihost")
    fields.define(Hosts)


def from_flags() -> Hosts | None:
    """The hosts of the run, from the parsed flags; None for a run of one process.

    Raises:
      ValueError: naming the flag that is missing or out of bounds.
    """
    if "multihost" not in FLAGS:
        return None
    names = ("coordinator_address", "num_processes", "process_id")
    hosts = fields.read(Hosts)
    fields.check(hosts)
    missing = [name for name in names if FLAGS[name].value is None]
    if len(missing) == len(names) and not FLAGS.multihost:
        return None
    if missing and not FLAGS.multihost:
        raise ValueError(
            f"--{missing[0]} is missing: a run of several processes needs "
            f"{', '.join(f'--{name}' for name in names)}, or --multihost on a TPU pod or cluster"
        )
    return hosts


@contextlib.contextmanager
def session(hosts: Hosts | None) -> Iterator[None]:
    """Joins the run's processes for the block; a failure in it ends this process immediately.

    On a normal exit JAX would wait for the other processes, which in turn wait for this one. The
    exit status is 1, or 130 after Ctrl-C before all have agreed to stop, or 134 (SIGABRT) where
    JAX's runtime noticed first that another process is gone.

    Args:
      hosts: how the processes find each other; None for a run of one process.

    Raises:
      SystemExit: raised in the block with a status, not a message, by all processes.
    """
    if hosts is None:
        yield
        return
    with _plain_runtime_log():
        try:
            with _ended_by_sigint(), _ended_after(hosts.initialization_timeout):
                patient = hosts.initialization_timeout + RUNTIME_PATIENCE
                multihost.connect(**dataclasses.asdict(hosts) | {"initialization_timeout": patient})
            end = None
            try:
                yield
            except SystemExit as stop:
                # A status without a message is an end that all processes have agreed on.
                if isinstance(stop.code, str):
                    raise
                end = stop
            jax.distributed.shutdown()
        except BaseException as error:
            _leave(error)
    if end is not None:
        raise end


def check(
    folder: pathlib.Path, run: Any, step: int, checkpoint: str = "", rejected: Sequence[str] = ()
) -> None:
    """Compares what all processes found; each of them must call this.

    Args:
      folder: where it was found, for the message.
      run: what is about to be trained, as JSON values.
      step: see `Found`.
      checkpoint: digest that tells a checkpoint from others of the same step.
      rejected: lines about newer checkpoints that this process found damaged.

    Raises:
      ValueError: there are other processes, and this one has not joined them.
      DifferingHostsError: they differ.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"--multihost is missing: this is one of {jax.process_count()} processes that share "
            "an accelerator, and each would write what one of them must"
        )
    found = Found(step, _digest(json.dumps(run, sort_keys=True)), _digest(checkpoint))
    differing = difference(_from_all(found))
    if differing is not None:
        reasons = f" ({'; '.join(rejected)})" if rejected else ""
        raise DifferingHostsError(f"{folder}: {differing}{reasons}")


def difference(found: Sequence[Found]) -> str | None:
    """How the first process that differs from process 0 does so, and the remedy; None if none.

    Args:
      found: what each process found, by its index.

    >>> start = Found(0, b"run", b"")
    >>> difference([start, start])
    >>> difference([start, start._replace(step=8)]).partition(";")[0]
    'process 0 finds no checkpoint (step 0), process 1 the checkpoint of step 8'
    """
    first = found[0]
    differing = [number for number, other in enumerate(found) if other != first]
    if not differing:
        return None
    number = differing[0]
    other = found[number]
    if other.run != first.run:
        return (
            f"processes 0 and {number} are about to train different things; "
            f"all need the same flags and data, and {_REMEDY}"
        )
    if other.step == first.step:
        two = f"processes 0 and {number} find different checkpoints"
        return f"{two} of step {first.step}; {_REMEDY}"
    return f"process 0 finds {_words(first)}, process {number} {_words(other)}; {_REMEDY}"


@contextlib.contextmanager
def _ended_by_sigint() -> Iterator[None]:
    """Lets Ctrl-C end a wait in C++ at once; Python would see it only after the wait."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Ends this process if the block, a wait for the other processes, takes longer."""
    too_late = ValueError(f"not all processes joined within --initialization_timeout={seconds} s")
    timer = threading.Timer(seconds, _leave, [too_late])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave(error: BaseException) -> None:
    lost = any(sign in str(error) for sign in LOST_SIGNS)
    status = 1
    if lost:
        message = f"error: {LOST}"
    elif isinstance(error, KeyboardInterrupt):
        message, status = INTERRUPTED, 128 + signal.SIGINT
    elif isinstance(error, SystemExit):
        message = str(error.code)
    elif isinstance(error, ValueError):
        message = f"error: {error}"
    else:
        traceback.print_exception(error)
        message = f"error: {type(error).__name__}: {error}"
    line = runtime_log.LAST_LINE + " ".join(message.split()) + "\n"
    with contextlib.suppress(OSError):
        os.write(2, line.encode(errors="replace"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def _plain_runtime_log() -> Iterator[None]:
    """Pipes file descriptor 2 through `runtime_log.py`; Python's own stderr is unchanged."""
    python_stderr = sys.stderr
    terminal = os.dup(2)
    reader = subprocess.Popen(  # noqa: S603
        [sys.executable, "-I", "-S", str(pathlib.Path(runtime_log.__file__)), LOST],
        stdin=subprocess.PIPE,
        stderr=terminal,
        # Ctrl-C is for this process; the reader ends when its input does.
        start_new_session=True,
    )
    sys.stderr = console.stream(os.dup(terminal))
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        sys.stderr.close()
        sys.stderr = python_stderr
        reader.wait()


def _words(found: Found) -> str:
    special = {
        FINISHED: "a finished run",
        UNFINISHED: "an unfinished run",
        0: "no checkpoint (step 0)",
    }
    return special.get(found.step, f"the checkpoint of step {found.step}")


def _from_all(found: Found) -> list[Found]:
    """What each process found, by its index."""
    own = np.frombuffer(_RECORD.pack(*found), np.uint8)
    records = multihost_utils.process_allgather(own)
    return [Found(*_RECORD.unpack(record.tobytes())) for record in records]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
