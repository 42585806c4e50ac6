"""Files that are whole or absent, and a record of the environment that results were made in."""

import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lpa_jax import files, multihost

SOURCES = ("experiments", "lpa_jax")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "tensorflow-datasets")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file atomically, on the first host only."""
    if multihost.is_first_host():
        files.write_text(path, text)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes JSON like `write_text`; non-finite numbers become null, NumPy values plain ones."""
    write_text(path, json.dumps(plain(content), indent=2, allow_nan=False) + "\n")


def check_writable(flag: str, path: str) -> None:
    """Raises ValueError naming `flag` unless a file can be written at `path`; writes nothing."""
    target = pathlib.Path(path).absolute()
    folder = next((parent for parent in target.parents if parent.exists()), target)
    if not path or target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--{flag} must name a file that can be written, got {path!r}")


def read_json(path: str | os.PathLike) -> Any | None:
    """Reads JSON; None if the file is missing, cut short or no JSON."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # deep nesting exhausts the parser's stack
        return None


def read_or_say(path: pathlib.Path, say: Callable[[str], None]) -> Any | None:
    """Reads JSON like `read_json`; says so if a file exists and cannot be read."""
    content = read_json(path)
    if content is None and path.exists():
        say(f"{path} is cut short or not JSON: it will be written again")
    return content


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
