"""Filters the log of JAX's C++ runtime: no stack traces when another process is lost.

`hosts.py` runs this file as a separate process, which reads standard input to its end and writes to
standard error. Its argument is the message for a lost process. It imports only the standard
library, so that it starts in milliseconds.
"""

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator

# Marks the last line of a process that ends by itself.
LAST_LINE = "\x02last line: "
# Lines from which on the runtime reports the end of another process; what follows is noise.
TROUBLE = re.compile(
    r"^[WEF]\d{4} .*(coordination_service|preemption_sync_manager|distributed/client|client\.h:)"
)
FATAL = "Terminating process because the JAX distributed service detected fatal errors"


def plain_lines(lines: Iterable[str], lost: str) -> Iterator[str]:
    """Yields the lines; those about a lost process are replaced by one line that says so.

    >>> end = ["E0101 1:2 3 coordination_service_agent.cc:289] Polled", f"F0101 {FATAL}", "@ 0x1"]
    >>> list(plain_lines(["compiling", *end], "a process died"))
    ['compiling', 'error: a process died']
    """
    trouble, fatal = False, False
    lines = iter(lines)
    for line in lines:
        if line.startswith(LAST_LINE):
            yield line.removeprefix(LAST_LINE)
            for _ in lines:
                pass
            return
        trouble = trouble or bool(TROUBLE.match(line))
        fatal = fatal or FATAL in line
        if not trouble:
            yield line
    if fatal:
        yield f"error: {lost}"


def main() -> None:
    """Filters standard input."""
    lines = (line.rstrip("\n") for line in open(0, errors="replace"))  # noqa: SIM115
    for line in plain_lines(lines, *sys.argv[1:]):
        with contextlib.suppress(OSError):  # the reader may be gone, and the input must be read on
            print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
