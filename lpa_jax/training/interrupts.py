"""Signals that ask a run to stop, as a question that a loop asks where it can stop without loss."""

import contextlib
import os
import signal
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

# From people, terminals that close, and queues.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class InterruptedRunError(Exception):
    """A run stopped because it was asked to; what it needs to resume is saved."""


class Interrupts:
    """Within its block, notes SIGTERM, SIGINT, SIGHUP and SIGUSR1; calling it says if one came.

    SIGHUP stays ignored where it is, as under nohup.

    A signal never cuts off what is running, a save least of all: the loop asks after every step
    and stops at a place of its choice. Only the third SIGINT ends the process at once, without
    saving, for someone at a terminal who will not wait for a compilation.

    With several processes, in which JAX catches SIGTERM itself, a signal to any of them is one to
    all: they ask equally often, and all get the same answer for the first time at the same call.
    That takes microseconds, and no device is waited for.

    Example:
      >>> with Interrupts() as interrupted:
      ...     before = interrupted()
      ...     signal.raise_signal(signal.SIGTERM)
      ...     before, interrupted(), interrupted.exit_status
      (False, True, 143)
    """

    def __init__(self, notify: Callable[[str], None] = lambda signal_name: None):
        """Nothing is handled before the block.

        Args:
          notify: Called with the name of the first signal, within its handler; an OSError of it, as
            from a terminal that is gone, is ignored.
        """
        self._notify = notify
        self._first: signal.Signals | None = None
        self._times_sigint = 0
        self._earlier = {}
        self._several = False
        self._calls, self._agreed = 0, False

    def __enter__(self) -> "Interrupts":
        self._several = jax.process_count() > 1
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        if self._several:
            ignored.add(signal.SIGTERM)
        self._earlier = {
            number: signal.signal(number, self._handle)
            for number in SIGNALS
            if number not in ignored
        }
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether a signal came."""
        if self._several and not self._agreed:
            self._calls += 1
            self._agreed = multihost_utils.reached_preemption_sync_point(self._calls)
        return self._agreed if self._several else self._first is not None

    @property
    def exit_status(self) -> int:
        """What the process should exit with: 128 + its signal's number, 0 without any.

        Of several processes, those that took no signal themselves exit as after SIGTERM.
        """
        if self._first is not None:
            return 128 + self._first
        return 128 + signal.SIGTERM if self._agreed else 0

    def _handle(self, number, frame) -> None:
        self._times_sigint += number == signal.SIGINT
        if self._times_sigint == 3:
            os._exit(128 + number)
        if self._first is None:
            self._first = signal.Signals(number)
            if self._several:
                os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells the other processes
            with contextlib.suppress(OSError):
                self._notify(self._first.name)
