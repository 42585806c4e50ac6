"""Flags of every training experiment that change no number of a run: seeds, output, checkpoints."""

import os
import pathlib
import sys
from typing import Any

import jax
from absl import flags

from experiments.runtime import fields, hosts
from experiments.training.saving import Saving
from lpa_jax import multihost

FLAGS = flags.FLAGS

# Seeds are hashed as 32 bits; more of them in one command are a slip, such as 2026 for 2026-2026.
MOST_SEEDS, SEED_LIMIT = 1000, 2**32
# Help of every --seeds.
SEEDS = "Number of seeds, or a list of seeds and ranges such as 0-3,8 (4-4: seed 4 alone)"


def define_console_flags() -> None:
    """Defines the flags of a process that saves no checkpoints."""
    flags.DEFINE_string(
        "compilation_cache",
        "runs/compilation_cache",
        "Folder where compiled programs are kept between runs; empty keeps none.",
    )
    flags.DEFINE_bool("quiet", False, "Print only the result, no progress.")


def define_runtime_flags() -> None:
    """Defines the flags of the console, of checkpoints and of runs on several hosts."""
    define_console_flags()
    fields.define(Saving)
    hosts.define_flags()


def say(line: str) -> None:
    """Prints one line to standard error, on the first host and unless --quiet."""
    if not FLAGS.quiet and multihost.is_first_host():
        print(line, file=sys.stderr)


def apply_runtime_flags() -> None:
    """Turns on the compilation cache."""
    if FLAGS.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(FLAGS.compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def saving() -> Saving:
    """When to save checkpoints, from the parsed flags.

    Raises:
      ValueError: naming the flag that is out of bounds.
    """
    return fields.read(Saving)


def seeds(texts: list[str]) -> list[int]:
    """Seeds from a flag: one number n means 0..n-1, several numbers and ranges mean themselves.

    Raises:
      ValueError: not whole numbers >= 0 or ranges of them, none, one twice, or too many.

    >>> seeds(["3"]), seeds(["4", "7"]), seeds(["0-3", "8"]), seeds(["4-4"])
    ([0, 1, 2], [4, 7], [0, 1, 2, 3, 8], [4])
    """
    given = ",".join(texts)
    if len(texts) == 1 and texts[0].strip().isdecimal():
        texts = [f"0-{int(texts[0]) - 1}"] if int(texts[0]) else []
        if int(given) > MOST_SEEDS:
            raise ValueError(
                f"--seeds must be at most {MOST_SEEDS} seeds, got {given!r}; the one seed is "
                f"{given.strip()}-{given.strip()}"
            )
    numbers = []
    for text in texts:
        first, dash, last = (part.strip() for part in text.partition("-"))
        last = last if dash else first
        if not first.isdecimal() or not last.isdecimal():
            raise ValueError(
                f"--seeds must be whole numbers >= 0 or ranges such as 4-7, got {given!r}"
            )
        if int(last) < int(first):
            raise ValueError(f"--seeds: the range {text.strip()!r} ends before it begins")
        if int(last) >= SEED_LIMIT or int(last) - int(first) >= MOST_SEEDS:
            raise ValueError(
                f"--seeds must be below 2**32 and at most {MOST_SEEDS}, got {text.strip()!r}"
            )
        numbers += range(int(first), int(last) + 1)
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"--seeds must name different seeds, got {given!r}")
    return numbers


def resolved() -> dict[str, Any]:
    """All flags of the project with their values, for the record."""
    own = ("experiments.", "__main__")
    return {
        flag.name: flag.value
        for module, module_flags in FLAGS.flags_by_module_dict().items()
        if module.startswith(own) or pathlib.Path(module).parent.name == "experiments"
        for flag in module_flags
    }
