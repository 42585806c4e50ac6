"""What a checkpoint folder holds, to the byte: SHA-256 of every file, and of the list itself."""

import dataclasses
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping
from typing import Any

from lpa_jax.files import read_bytes, write_text

FORMAT = 1
NAME = "manifest.json"


class DamagedError(Exception):
    """A checkpoint is not what was written; the message says why."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The record of one checkpoint, plain JSON values throughout.

    Attributes:
      step: Steps completed.
      config: What decides the run's result; another one may not resume it.
      notes: Whatever the run wants back beside its arrays.
      scores: Step -> score of the evaluations so far; the best one's checkpoint is kept.
      files: Name -> SHA-256 of every other file in the folder.
    """

    step: int
    config: Mapping[str, Any]
    notes: Mapping[str, Any]
    scores: Mapping[str, float]
    files: Mapping[str, str]

    def digest(self) -> str:
        """SHA-256 of the manifest, and so of every file that it names."""
        return _digest(_content(self))


def write(folder: pathlib.Path, manifest: Manifest) -> None:
    """Writes the manifest, atomically: the last file of a checkpoint.

    Raises:
      ValueError: Config, notes or scores hold something else than finite JSON values.
      OSError: It cannot be written.
    """
    content = _content(manifest) | {"digest": manifest.digest()}
    write_text(folder / NAME, json.dumps(content, indent=1, allow_nan=False) + "\n")


def verify(folder: pathlib.Path) -> Manifest:
    """Reads the manifest and compares every file of the folder with it.

    Names in the manifest open nothing: the folder is walked, without following links, and what is
    found there is looked up.

    Raises:
      DamagedError: The folder is not exactly what was written, or of another format version.
    """
    manifest = _read(folder)
    found = hash_files(folder)
    for name, expected in manifest.files.items():
        if name not in found:
            raise DamagedError(f"{name!r} is missing")
        if found[name] != expected:
            raise DamagedError(f"{name!r} has changed")
    extra = sorted(set(found) - set(manifest.files))
    if extra:
        raise DamagedError(f"{extra[0]!r} does not belong there")
    return manifest


def _read(folder: pathlib.Path) -> Manifest:
    path = folder / NAME
    if not path.exists():
        raise DamagedError(f"{NAME!r} is missing")
    try:
        content = json.loads(read_bytes(path))
    # Deep nesting exhausts the parser's stack.
    except (OSError, ValueError, RecursionError):
        raise DamagedError(f"{NAME!r} cannot be read") from None
    if not isinstance(content, dict) or "format" not in content:
        raise DamagedError(f"{NAME!r} is no manifest")
    if content["format"] != FORMAT:
        raise DamagedError(
            f"it has format version {content['format']!r}, this program reads version {FORMAT}"
        )
    digest = content.pop("digest", None)
    if digest != _digest(content):
        raise DamagedError(f"{NAME!r} has changed")
    del content["format"]
    try:
        manifest = Manifest(**content)
    except TypeError:
        raise DamagedError(f"{NAME!r} is no manifest") from None
    _check_types(manifest)
    return manifest


def _check_types(manifest: Manifest) -> None:
    """Refuses a manifest of another program: its digest is right, what it holds is not."""
    for field in ("config", "notes", "scores", "files"):
        if not isinstance(getattr(manifest, field), dict):
            raise DamagedError(f"{NAME!r} has {field} that are no mapping")
    scores = manifest.scores.items()
    sound = {
        "step": type(manifest.step) is int and manifest.step >= 0,
        "scores": all(s.isdecimal() and type(value) in (int, float) for s, value in scores),
        "files": all(isinstance(value, str) for value in manifest.files.values()),
    }
    for field, is_sound in sound.items():
        if not is_sound:
            raise DamagedError(f"{NAME!r} has {field} of a wrong type")


def _content(manifest: Manifest) -> dict[str, Any]:
    return {"format": FORMAT, **dataclasses.asdict(manifest)}


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_files(folder: pathlib.Path, *, to_disk: bool = False) -> dict[str, str]:
    """SHA-256 by name of every file below a folder, the manifest excepted.

    Args:
      folder: Where to look.
      to_disk: Also have the kernel write each file and folder out, to survive a power cut.

    Raises:
      DamagedError: Something is neither a file nor a folder, such as a symbolic link.
      OSError: A file cannot be read.
    """
    hashes = {}
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        mode = path.lstat().st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise DamagedError(f"{name!r} is neither a file nor a folder")
        if stat.S_ISREG(mode) and name != NAME:
            with path.open("rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
        if to_disk:
            flush_to_disk(path)
    return hashes


def _walk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    for root, folders, names in os.walk(folder):
        yield from (pathlib.Path(root, name) for name in (*folders, *names))


def flush_to_disk(path: pathlib.Path) -> None:
    """Has the kernel write out a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
