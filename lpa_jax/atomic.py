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
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; this one is as readable as its folder.
        pathlib.Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise
