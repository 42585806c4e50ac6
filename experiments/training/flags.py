"""Flags of every training experiment that change no number of a run: seeds, output, checkpoints."""

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags

from experiments.runtime import fields, files, hosts
from experiments.runtime import main as entry_point
from experiments.training.saving import Saving
from lpa_jax import checks, multihost

FLAGS = flags.FLAGS

# Parts whose radius is relative to the mean norm of the activation, and a radius that destroys it.
RELATIVE, LARGE_RADIUS = ("lpa", "adversarial"), 10.0
# Seeds are hashed as 32 bits.
SEED_LIMIT = 2**32
# More seeds in one command are a slip, such as 0-20260101 for 20260101.
MOST_SEEDS = 1000
# A bare number up to this one counts seeds, as in commands of the first release. A larger one may
# be meant as a seed.
MOST_UNNAMED = 20


def define_seeds(count: int | None = 3, seeds: Sequence[str] = (), about: str = "") -> None:
    """Defines --num_seeds and --seeds.

    Args:
      count: default of --num_seeds; None where the seeds are named.
      seeds: default of --seeds.
      about: follows the help.
    """
    flags.DEFINE_integer("num_seeds", count, f"Number of seeds: 0, 1, ...{about}.")
    flags.DEFINE_list(
        "seeds", list(seeds), "Seeds by name, in place of --num_seeds: 0-3,8; 4-4 is seed 4 alone."
    )


def define_console_flags() -> None:
    """Defines the flags of a process that saves no checkpoints."""
    files.define_path(
        "compilation_cache",
        "runs/compilation_cache",
        "Folder where compiled programs are kept between runs; empty keeps none.",
        folder=True,
        optional=True,
    )
    flags.DEFINE_bool("quiet", False, "Print only the result, no progress.")
    fields.place("saving", "workdir", "output", "quiet")
    fields.place("machines", "compilation_cache")


def define_runtime_flags() -> None:
    """Defines the flags of the console, of checkpoints and of runs on several hosts."""
    define_console_flags()
    fields.define(Saving)
    hosts.define_flags()


def say(line: str) -> None:
    """Prints one line to standard error, on the first host and unless --quiet."""
    if not FLAGS.quiet and multihost.is_first_host():
        print(line, file=sys.stderr)


def warn(batch_size: int, size: int, options: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints a line for each setting that is allowed but probably a mistake.

    Args:
      batch_size: examples in a step.
      size: of the training set, or of the smallest training domain.
      options: of every method.
    """
    if batch_size > size:
        say(f"--batch_size={batch_size} is above the {size} training images: steps repeat images")
    for method, of_method in options.items():
        for part in RELATIVE:
            radius = of_method.get(f"{part}.radius") or 0
            if radius > LARGE_RADIUS:
                say(f"{method}: {part}.radius={radius:g} is relative: {radius:g} times mean ||h||")


def apply_runtime_flags() -> None:
    """Turns on the compilation cache; called when nothing is left to refuse."""
    if FLAGS.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(FLAGS.compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def saving() -> Saving:
    """When to save checkpoints, from the parsed flags.

    Raises:
      ValueError: naming the flag that is out of bounds.
    """
    return fields.read(Saving)


def seeds() -> list[int]:
    """The seeds that --num_seeds counts or --seeds names.

    Raises:
      ValueError: as `numbers`; or both flags are given.
    """
    if FLAGS["num_seeds"].present and FLAGS["seeds"].present:
        raise ValueError("--num_seeds and --seeds say the same: give one")
    if FLAGS["seeds"].present or FLAGS.num_seeds is None:
        return numbers(FLAGS.seeds)
    return [*range(checks.integer("--num_seeds", FLAGS.num_seeds, 1, MOST_SEEDS))]


def numbers(texts: Sequence[str]) -> list[int]:
    """Seeds by name: several numbers and ranges; one small number alone counts them.

    Raises:
      ValueError: not whole numbers >= 0 or ranges of them, none, one twice, or too many.

    >>> numbers(["4", "7"]), numbers(["0-3", "8"]), numbers(["4-4"])
    ([4, 7], [0, 1, 2, 3, 8], [4])
    """
    if len(texts) == 1 and _whole(texts[0]) is not None:
        return _counted(_whole(texts[0]))
    given, found = ",".join(texts), []
    for text in texts or [""]:
        first, dash, last = text.partition("-")
        low, high = _whole(first), _whole(last if dash else first)
        if low is None or high is None:
            allowed = f"whole numbers in 0..2**32-1, or ranges such as 4-7, at most {MOST_SEEDS}"
            raise ValueError(f"--seeds must be {allowed}, got {given[:200]!r}")
        if high < low:
            raise ValueError(f"--seeds: the range {text.strip()!r} ends before it begins")
        if high - low + len(found) >= MOST_SEEDS:
            raise ValueError(f"--seeds must be at most {MOST_SEEDS}, got {given[:200]!r}")
        found += range(low, high + 1)
    if len(set(found)) < len(found):
        raise ValueError(f"--seeds must name different seeds, got {given!r}")
    return found


def _whole(text: str) -> int | None:
    """A seed; None for what is none."""
    text = text.strip()
    is_number = text.isascii() and text.isdecimal() and len(text) <= len(str(SEED_LIMIT))
    return int(text) if is_number and int(text) < SEED_LIMIT else None


def _counted(count: int) -> list[int]:
    """0..count-1, as the first release took --seeds=COUNT; says how to write that now."""
    one = f"--seeds={count}-{count}"
    if not 0 < count <= MOST_UNNAMED:
        raise ValueError(
            f"--seeds must name seeds, such as 0-3,8; write --num_seeds={count} for {count} seeds, "
            f"{one} for the one seed, got {count}"
        )
    taken = f"{count} seeds, 0 to {count - 1}" if count > 1 else "1 seed, 0"
    _note(
        f"--seeds={count} takes {taken}: write --num_seeds={count} for this, {one} for the one seed"
    )
    return [*range(count)]


@functools.cache
def _note(line: str) -> None:
    if not FLAGS.quiet:
        print(line, file=sys.stderr)


def resolved() -> dict[str, Any]:
    """All flags of the project with their values, for the record."""
    return {flag.name: flag.value for flag in entry_point.own_flags()}
