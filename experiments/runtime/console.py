"""Console output that never ends or changes the work.

A reader may go away (`| head`, a closed terminal), the disk of a log may be full, a pager may stop
reading. What cannot be written is dropped: `install` gives `sys.stdout` and `sys.stderr` files that
raise no OSError, and everything that prints uses those.
"""

import contextlib
import io
import os
import select
import sys
from typing import TextIO

from absl import logging

# A pipe that is ready takes this much without waiting.
_CHUNK = 4096
_POLL_MILLISECONDS = 200
_stopping = False


class _Descriptor(io.FileIO):
    """Drops what cannot be written, and waits for no slow reader once a signal came."""

    def write(self, data) -> int:
        chunk = memoryview(data)[:_CHUNK]
        with contextlib.suppress(OSError, ValueError):
            poll = select.poll()
            poll.register(self.fileno(), select.POLLOUT)
            while True:
                if poll.poll(_POLL_MILLISECONDS):
                    written = super().write(chunk)
                    if written is not None:
                        return written
                elif _stopping:
                    break
        return len(chunk)


def stream(descriptor: int, *, buffered: bool = False) -> TextIO:
    """A text file over a descriptor that raises no error when it is written to.

    Args:
      descriptor: 1 or 2, which stay open, or another one, which is closed with the file.
      buffered: whether lines may wait until there are more of them.
    """
    raw = _Descriptor(descriptor, "w", closefd=descriptor > 2)
    usual = sys.__stderr__
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=usual.encoding if usual is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=not buffered,
    )


def install() -> None:
    """Gives the process a standard output and a standard error that raise no error."""
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            file.flush()
    sys.stdout = stream(1, buffered=not os.isatty(1))
    sys.stderr = stream(2)
    logging.get_absl_handler().python_handler.setStream(sys.stderr)


def stop_waiting() -> None:
    """From now on drops what a slow reader would make the process wait for: it is to stop."""
    global _stopping
    _stopping = True


def announce(line: str) -> None:
    """Writes a line from a signal handler, which may have come in the middle of a print."""
    stop_waiting()
    with contextlib.suppress(OSError):
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        if poll.poll(0):
            os.write(2, f"{line}\n".encode(errors="replace"))
