"""SIGTERM and SIGINT as a question that a loop asks where it can stop without loss."""

import os
import signal
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class InterruptedRunError(Exception):
    """A run stopped because it was asked to; what it needs to go on is saved."""


class Interrupts:
    """Within its block, notes SIGTERM and SIGINT; calling it says whether one came.

    A signal never cuts off what is running, a save least of all: the loop asks after every step
    and stops at a place of its choice. Only the third SIGINT ends the process at once, without
    saving, for someone at a terminal who will not wait for a compilation.

    >>> with Interrupts() as interrupted:
    ...     before = interrupted()
    ...     signal.raise_signal(signal.SIGTERM)
    ...     before, interrupted(), interrupted.exit_status
    (False, True, 143)
    """

    def __init__(self, notify: Callable[[str], None] = lambda signal_name: None):
        """Nothing is handled before the block.

        Args:
          notify: called with the name of the first signal, within its handler.
        """
        self._notify = notify
        self._first: signal.Signals | None = None
        self._times_sigint = 0
        self._earlier = {}

    def __enter__(self) -> "Interrupts":
        self._earlier = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self._first is not None

    @property
    def exit_status(self) -> int:
        """What the process should exit with: 128 + the signal's number, 0 without one."""
        return 0 if self._first is None else 128 + self._first

    def _handle(self, number, frame) -> None:
        self._times_sigint += number == signal.SIGINT
        if self._times_sigint == 3:
            os._exit(128 + number)
        if self._first is None:
            self._first = signal.Signals(number)
            self._notify(self._first.name)
