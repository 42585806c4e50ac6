"""Files that appear whole or not at all."""

import os
import pathlib
import tempfile


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file beside its place and renames it, so that a reader never sees half of it.

    Parent folders are made.

    Raises:
      OSError: the file cannot be written; nothing is left behind.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text(folder + "/a/b.txt", "whole")
    ...     pathlib.Path(folder, "a", "b.txt").read_text()
    'whole'
    """
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file as `write_text` does; a link in its place is replaced, not followed.

    Raises:
      OSError: the file cannot be written; nothing is left behind.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; this one is as readable as its folder.
        pathlib.Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise
