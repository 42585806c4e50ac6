"""What every experiment's `main` does around its work: flags, arguments, errors and signals."""

import contextlib
import ctypes
import itertools
import logging
import os
import pathlib
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable

import jax
from absl import app, flags

from experiments.runtime import console, fields, files, hosts
from lpa_jax import checks
from lpa_jax.checkpoints import checkpoints
from lpa_jax.files import LockedError, read_bytes
from lpa_jax.training import loop
from lpa_jax.training.interrupts import InterruptedRunError, Interrupts

FLAGS = flags.FLAGS
MOST_LETTERS = 2000  # of an error
MOST_BYTES = 2**16  # of a file of flags
# Of mallopt: M_ARENA_MAX=1, M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1 (never).
GLIBC_OPTIONS = {-8: 1, -4: 0, -1: -1}
HELP = {"--help", "-help", "--h", "-h", "--helpshort", "--helpfull"}


def start(
    define_flags: Callable[[], None], main: Callable[[list[str]], None], hint: str = ""
) -> None:
    """Runs an experiment from the command line; a wrong flag is one line.

    Args:
      define_flags: defines the experiment's flags, all of which --help shows.
      main: does the work; called with the command line after flags are parsed.
      hint: follows the message about a flag that does not exist.
    """

    def parse(argv):
        try:
            rest = FLAGS(with_flagfiles(argv))
            files.check_folders()
            return rest
        except flags.UnrecognizedFlagError as error:
            text, meant = str(error), fields.meant(error.flagname)
            # Before the nearest spelling, which is another flag's.
            text = text.partition(". Did you mean")[0] + meant if meant else text
            sys.exit(refusal(text + hint))
        except (flags.Error, ValueError) as error:
            sys.exit(refusal(f"{error}{_nearest(str(error))}"))

    console.install()
    heed_ctrl_c()
    _keep_memory()
    # Its notes are about accelerators that this machine has not.
    logging.getLogger("jax").setLevel(logging.WARNING)
    define_flags()
    if HELP & {*itertools.takewhile(lambda word: word != "--", sys.argv[1:])}:
        print(help_text(sys.modules[define_flags.__module__].__doc__ or ""))
        sys.exit(0)
    try:
        app.run(main, flags_parser=parse)
    except KeyboardInterrupt:
        _leave("interrupted")


def _nearest(refused: str) -> str:
    """What is added to absl's message about a value that a flag does not allow, or nothing."""
    found = re.match(r"flag --(\w+)=(.*): value should be one of <", refused, re.DOTALL)
    return checks.nearest(found[2], FLAGS[found[1]].parser.enum_values) if found else ""


def with_flagfiles(words: Iterable[str], above: tuple[str, ...] = ()) -> list[str]:
    """The words, where the lines of its file replace each --flagfile.

    absl would wait for the writer of a named pipe, and read a device until the memory is full.

    Args:
      words: of the command line or of a file.
      above: the files that led to this one.

    Raises:
      ValueError: a file cannot be read, is too large, is no text, or names itself.
    """
    found, left = [], iter(words)
    for word in left:
        if word == "--":
            return [*found, word, *left]
        name, given, path = word.partition("=")
        if name not in ("--flagfile", "-flagfile"):
            path = ""
        elif not given:
            path = next(left, "")
        if path in above:
            raise ValueError(f"--flagfile must not name itself, got {path!r}")
        found += with_flagfiles(_lines(path), (*above, path)) if path else [word]
    return found


def _lines(path: str) -> list[str]:
    """The lines of a file of flags that are neither empty nor comments."""
    path = os.path.expanduser(path)
    try:
        text = read_bytes(path, MOST_BYTES).decode()
    except OSError as error:
        raise ValueError(f"--flagfile: {path}: {error.strerror}") from error
    except ValueError:  # too large, or not UTF-8
        text = None
    if text is None or "\0" in text or (not text and pathlib.Path(path).is_fifo()):
        most = f"of at most {MOST_BYTES} bytes"
        raise ValueError(f"--flagfile must name a text file {most}, got {path!r}")
    lines = map(str.strip, text.split("\n"))
    return [line for line in lines if line and not line.startswith(("#", "//"))]


def heed_ctrl_c() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again, which it does not while modules are imported."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _keep_memory() -> None:
    """Tells glibc to keep freed memory for the next step; MALLOC_* variables come first.

    On CPUs XLA allocates the memory of a step in one block. glibc gives a large block back to the
    system when it is freed, and the next step pays for each of its pages again. See docs/costs.md.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in GLIBC_OPTIONS.items():
            mallopt(option, value)


def refusal(error: Exception | str) -> str:
    """The line that a command ends with; messages quote whatever was typed."""
    said = files.explained(error) if isinstance(error, OSError) else str(error)
    text = " ".join(said.split())
    return f"error: {text if len(text) <= MOST_LETTERS else text[:MOST_LETTERS] + '...'}"


def help_text(about: str) -> str:
    """What --help prints: what the experiment does, then its flags in groups."""
    by_group: dict[str, list[flags.Flag]] = {}
    for flag in own_flags():
        by_group.setdefault(fields.group_of(flag.name), []).append(flag)
    lines = [about.strip()]
    for group in fields.GROUPS:
        if group in by_group:
            title = f"{group[0].upper()}{group[1:]}" if len(by_group) > 1 else "Flags"
            lines += ["", f"{title}:", *map(_described, by_group[group])]
    return "\n".join(lines)


def own_flags() -> list[flags.Flag]:
    """The flags of the project, in the order in which they were defined."""
    own = ("experiments.", "__main__")
    return [
        flag
        for module, of_module in FLAGS.flags_by_module_dict().items()
        if module.startswith(own) or pathlib.Path(module).parent.name == "experiments"
        for flag in of_module
    ]


def _described(flag: flags.Flag) -> str:
    shown = f"={flag.default_as_str}" if flag.default not in (None, "", []) else "="
    if isinstance(flag, flags.BooleanFlag) or flag.boolean:
        shown = f"={str(bool(flag.default)).lower()}"
    wrapped = textwrap.wrap(flag.help, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([f"  --{flag.name}{shown}".replace("'", ""), *wrapped])


def refuse_arguments(argv: list[str]) -> None:
    """Exits with one line if anything but flags was on the command line."""
    if len(argv) > 1:
        sys.exit(
            f"error: unexpected argument {argv[1]!r}; write flags as --name=value, lists with "
            "commas: --methods=erm,lpa"
        )


def check_devices() -> None:
    """Exits with one line if JAX finds no device of the kind that JAX_PLATFORMS names."""
    try:
        jax.devices()
    # JAX has an assertion here, too.
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        sys.exit(f"error: JAX_PLATFORMS={platforms}: JAX finds no such device{reason}")


def run(argv: list[str], work: Callable[[Interrupts], None]) -> None:
    """Does the work; exits with one line if a flag is wrong or the user interrupts.

    Args:
      argv: the command line after flags are parsed, of which nothing may be left.
      work: called with the `Interrupts` of the run, whose block it enters itself.
    """
    refuse_arguments(argv)
    try:
        of_run = hosts.from_flags()
    except ValueError as error:
        sys.exit(refusal(error))
    try:
        with hosts.session(of_run):
            _work(work)
    except KeyboardInterrupt:
        _leave(hosts.INTERRUPTED)


def _leave(line: str) -> None:
    """Ends the process after Ctrl-C; the usual end crashes if the signal came within JAX's code."""
    print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + signal.SIGINT)


def _work(work: Callable[[Interrupts], None]) -> None:
    interrupts = Interrupts(
        lambda signal_name: console.announce(f"{signal_name}: saving at the next safe point")
    )
    check_devices()
    try:
        work(interrupts)
    except (
        ValueError,
        OSError,
        loop.NonFiniteLossError,
        checkpoints.CheckpointError,
        LockedError,
    ) as error:
        sys.exit(refusal(error))
    except hosts.DifferingHostsError as error:
        # All processes raise it: a status without a message ends them together.
        print(refusal(error), file=sys.stderr)
        sys.exit(1)
    except InterruptedRunError as stop:
        print(f"{stop}; the same command resumes it", file=sys.stderr)
        sys.exit(interrupts.exit_status)
