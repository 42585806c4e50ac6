"""What every experiment's `main` does around its work: arguments, errors and signals."""

import os
import signal
import sys
from collections.abc import Callable

from experiments.runtime import agreement
from experiments.runtime import hosts as distributed
from lpa_jax import workdir_lock
from lpa_jax.checkpoints import checkpoints as checkpoint
from lpa_jax.interrupts import InterruptedRunError, Interrupts
from lpa_jax.training import loop as trainer


def run(argv: list[str], work: Callable[[Interrupts], None]) -> None:
    """Does the work; exits with one line where the flags are wrong or the user interrupts.

    Args:
      argv: the command line after flags are parsed, of which nothing may be left.
      work: called with what says whether to stop; it opens its block where that may be asked.
    """
    refuse_arguments(argv)
    try:
        hosts = distributed.hosts_from_flags()
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        with distributed.session(hosts):
            _work(work)
    except KeyboardInterrupt:
        print(distributed.INTERRUPTED, file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def refuse_arguments(argv: list[str]) -> None:
    """Exits with one line if anything but flags was on the command line."""
    if len(argv) > 1:
        sys.exit(
            f"error: unexpected argument {argv[1]!r}; write flags as --name=value, lists with "
            "commas: --methods=erm,lpa"
        )


def _work(work: Callable[[Interrupts], None]) -> None:
    interrupts = Interrupts(_announce)
    try:
        work(interrupts)
    except (
        ValueError,
        OSError,
        trainer.NonFiniteLossError,
        checkpoint.CheckpointError,
        workdir_lock.LockedError,
    ) as error:
        sys.exit(f"error: {error}")
    except agreement.DifferingHostsError as error:
        # All processes raise it: a status without words has them end together, each with its line.
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except InterruptedRunError as stop:
        print(f"{stop}; the same command goes on from there", file=sys.stderr)
        sys.exit(interrupts.exit_status)


def _announce(signal_name: str) -> None:
    # Straight to the descriptor: a signal may come in the middle of a print.
    os.write(2, f"{signal_name}: saving at the next safe point\n".encode())
