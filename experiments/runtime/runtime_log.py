"""What JAX's C++ runtime logs, line by line, without the stack traces of an expected end.

Run as a process of its own, which reads standard input to its end and writes to standard error;
its argument is the sentence for a lost process. It imports nothing but the standard library, so
that it starts in milliseconds.
"""

import re
import sys
from collections.abc import Iterable, Iterator

# Before the last words of a process that ends by its own decision.
LAST_LINE = "\x02last line: "
# The first signs that the runtime has noticed the end of another process; what follows is noise.
TROUBLE = re.compile(
    r"^[WEF]\d{4} .*(coordination_service|preemption_sync_manager|distributed/client|client\.h:)"
)
FATAL = "Terminating process because the JAX distributed service detected fatal errors"


def plain_lines(lines: Iterable[str], lost: str) -> Iterator[str]:
    """The lines as they come; from the first sign of trouble on, one line that says what it means.

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
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
