"""Files that are whole or absent, and a record of the environment that results were made in."""

import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import flags

from experiments.runtime import schema
from lpa_jax import files, multihost

FLAGS = flags.FLAGS
SOURCES = ("experiments", "lpa_jax")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "tensorflow-datasets")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file atomically, on the first host only."""
    if multihost.is_first_host():
        files.write_text(path, text)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes JSON like `write_text`; non-finite numbers become null, NumPy values plain ones."""
    write_text(path, json.dumps(plain(content), indent=2, allow_nan=False) + "\n")


class _PathParser(flags.ArgumentParser):
    """Reads the value of a flag with `local_path`."""

    def __init__(self, folder: bool, optional: bool):
        super().__init__()
        self.folder, self.optional, self.syntactic_help = folder, optional, "a path"

    def parse(self, argument: str) -> str:
        return "" if self.optional and not argument else local_path(argument)


def define_path(
    name: str, default: str | None, help: str, *, folder: bool = False, optional: bool = False
) -> None:
    """Defines a flag for a path; `~` is the home folder, which shells leave alone after `=`.

    Args:
      name: of the flag.
      default: of the flag.
      help: of the flag.
      folder: whether it must be a folder to write to, which `check_folders` checks.
      optional: whether it may be empty.
    """
    parser, serializer = _PathParser(folder, optional), flags.ArgumentSerializer()
    flags.DEFINE(parser, name, default, help, serializer=serializer)


def local_path(text: str) -> str:
    """The path with `~` and `~user` replaced.

    Raises:
      ValueError: it is empty, an address, below an unknown home folder, or not UTF-8.

    >>> local_path("s3://bucket/runs")
    Traceback (most recent call last):
    ValueError: must be a path on this machine, got 's3://bucket/runs'
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ValueError(f"must be a path on this machine, got {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"must be a path in UTF-8, got {text!r}") from None
    if not text.strip() or "\0" in text:
        raise ValueError(f"must be a path, got {text!r}")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"must be a path, got {text!r} without a home folder for it")
    return path


def check_folders() -> None:
    """Refuses flags for folders to write to that name anything else.

    Raises:
      ValueError: naming the flag.
    """
    for name, path in _folders():
        there = next(place for place in (path, *path.parents) if os.path.lexists(place))
        if not there.is_dir():
            raise ValueError(f"--{name} must name a folder, got {FLAGS[name].value!r}")
        # JAX does without a compilation cache that it cannot write.
        if not FLAGS[name].parser.optional and not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(
                f"--{name} must name a folder that can be written to, got {FLAGS[name].value!r}"
            )


def explained(error: OSError) -> str:
    """What the system says of a file, after the flag of the folder that it lies in."""
    if isinstance(error.filename, str):
        place = pathlib.Path(error.filename).absolute()
        for name, path in _folders():
            if place.is_relative_to(path) or path.is_relative_to(place):
                return f"--{name}: {place}: {error.strerror}"
    return str(error)


def _folders() -> Iterator[tuple[str, pathlib.Path]]:
    """Flags for folders to write to that are set, with their absolute paths."""
    for name in FLAGS:
        flag = FLAGS[name]
        if isinstance(flag.parser, _PathParser) and flag.parser.folder and flag.value:
            yield name, pathlib.Path(flag.value).absolute()


def check_writable(flag: str, path: str) -> None:
    """Raises ValueError naming `flag` unless a file can be written at `path`; writes nothing."""
    target = pathlib.Path(path).absolute()
    try:
        folder = next((parent for parent in target.parents if parent.exists()), target)
        fits = bool(path) and not target.is_dir() and folder.is_dir() and os.access(folder, os.W_OK)
    except OSError:  # a name that is too long
        fits = False
    if not fits:
        raise ValueError(f"--{flag} must name a file that can be written, got {path[:200]!r}")


def read_json(path: str | os.PathLike) -> Any | None:
    """Reads JSON of any kind; None if the file is missing, cut short or no JSON."""
    try:
        return schema.read(pathlib.Path(path), schema.ANY)
    except ValueError:
        return None


def plain(value: Any) -> Any:
    """Plain JSON values: NumPy scalars and arrays become numbers and lists, NaN becomes None.

    >>> plain({"a": np.float32(0.5), "b": np.array([1.0, np.nan])})
    {'a': 0.5, 'b': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


@functools.cache
def environment() -> dict[str, str]:
    """Versions of the packages that matter, and this project's git revision, read once."""
    versions = {"git revision": git_revision(), "Python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return versions | {"system": platform.platform()}


def git_revision() -> str:
    """Commit of the project's folder, marked if files differ from it; unknown without git."""
    folder = pathlib.Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(  # noqa: S603 (no shell, no argument from outside)
            ["git", "-C", folder, *arguments],  # noqa: S607 (git where the user has it)
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
        return git("rev-parse", "HEAD") + (", files changed since" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
