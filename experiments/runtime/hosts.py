"""Experiments on many hosts: flags, and an end in one plain line when another process is lost.

When a process dies or stops, JAX's runtime ends the others from C++: a stack trace on standard
error, then SIGABRT; no Python code runs. So that a user still reads what happened, everything
that C++ writes to standard error passes through a small process of its own (`runtime_log.py`),
which outlives this one, lets all other lines through and says in one line what such an end means.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator

import jax
from absl import flags

from experiments.runtime import runtime_log
from lpa_jax import multihost

FLAGS = flags.FLAGS
# How the backends' collectives fail in the processes that are left.
LOST_SIGNS = ("Gloo", "coordination service", "CoordinationService", "NCCL", "UNAVAILABLE:")
# Seconds beyond --initialization_timeout after which the runtime gives up waiting, too. It takes up
# to six more and prints a stack trace, so the wait is ended here, on time.
RUNTIME_PATIENCE = 30
INTERRUPTED = "interrupted: the same command goes on from there"
LOST = "lost the connection to another process of the run, which died, stopped or cannot be reached"


def define_flags() -> None:
    """Flags that join several processes to one run."""
    flags.DEFINE_bool(
        "multihost",
        False,
        "Join the processes of a TPU pod, Slurm or Open MPI job, which the environment describes.",
    )
    flags.DEFINE_string(
        "coordinator_address", None, "host:port of process 0, where no environment tells it."
    )
    flags.DEFINE_integer("num_processes", None, "Processes of the run, one a host.")
    flags.DEFINE_integer("process_id", None, "This process, from 0.")
    flags.DEFINE_integer(
        "initialization_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1
    )
    flags.DEFINE_integer(
        "heartbeat_timeout",
        100,
        "Seconds of silence after which a process counts as dead.",
        lower_bound=1,
    )


@dataclasses.dataclass(frozen=True)
class Hosts:
    """How the processes of a run find each other; see `multihost.connect`."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    initialization_timeout: int = 300
    heartbeat_timeout: int = 100


def hosts_from_flags() -> Hosts | None:
    """What the flags ask for; None for a run of one process.

    Raises:
      ValueError: naming the flag that is missing.
    """
    if "multihost" not in FLAGS:
        return None
    names = ("coordinator_address", "num_processes", "process_id")
    missing = [name for name in names if FLAGS[name].value is None]
    if len(missing) == len(names) and not FLAGS.multihost:
        return None
    if missing and not FLAGS.multihost:
        raise ValueError(
            f"--{missing[0]} is missing: a run of several processes needs "
            f"{', '.join(f'--{name}' for name in names)}, or --multihost on a TPU pod or cluster"
        )
    return Hosts(**{field.name: FLAGS[field.name].value for field in dataclasses.fields(Hosts)})


@contextlib.contextmanager
def session(hosts: Hosts | None) -> Iterator[None]:
    """Joins the run's processes for the block; a failure in it ends this process at once.

    At once, since on the usual way out JAX waits for the other processes, which in turn wait for
    this one. The exit status is 1 then, 130 after Ctrl-C where nobody had agreed to stop yet, 134
    (SIGABRT) where JAX's runtime noticed first that another process is gone.

    Args:
      hosts: how the processes find each other; None for a run of one process.

    Raises:
      SystemExit: raised in the block with a status, not a message; all processes end so.
    """
    if hosts is None:
        yield
        return
    with _plain_runtime_log():
        logging.getLogger("jax").setLevel(logging.WARNING)
        try:
            with _ended_by_sigint(), _ended_after(hosts.initialization_timeout):
                patient = hosts.initialization_timeout + RUNTIME_PATIENCE
                multihost.connect(**dataclasses.asdict(hosts) | {"initialization_timeout": patient})
            end = None
            try:
                yield
            except SystemExit as stop:
                # A status without words is an end that all processes have agreed upon.
                if isinstance(stop.code, str):
                    raise
                end = stop
            jax.distributed.shutdown()
        except BaseException as error:
            _leave(error)
    if end is not None:
        raise end


@contextlib.contextmanager
def _ended_by_sigint() -> Iterator[None]:
    """Lets Ctrl-C end a wait in C++, after which Python would learn of it only."""
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
    """Ends this process if the block, a wait for the other processes, takes longer than that."""
    too_late = ValueError(f"not all processes came within --initialization_timeout={seconds} s")
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
    os.write(2, line.encode(errors="replace"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def _plain_runtime_log() -> Iterator[None]:
    """Leads file descriptor 2 through `runtime_log.py`; Python's own stderr stays what it is."""
    python_stderr = sys.stderr
    terminal = os.dup(2)
    reader = subprocess.Popen(  # noqa: S603
        [sys.executable, "-I", "-S", str(pathlib.Path(runtime_log.__file__)), LOST],
        stdin=subprocess.PIPE,
        stderr=terminal,
        # Ctrl-C is for this process; the reader goes when nobody writes to it any more.
        start_new_session=True,
    )
    sys.stderr = os.fdopen(os.dup(terminal), "w", buffering=1)
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
