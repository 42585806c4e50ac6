"""Files that appear whole or not at all, and one run at a time in a folder."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator

LOCK = "lock"
# What the system says of an open for writing that follows no link.
KINDS = {
    errno.ELOOP: "a symbolic link",
    errno.EISDIR: "a folder",
    errno.ENXIO: "a device or socket",
}


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file beside its place and renames it, so that a reader never sees half of it.

    Parent folders are made.

    Raises:
      OSError: The file cannot be written; nothing is left behind.

    Example:
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_text(folder + "/a/b.txt", "whole")
      ...     pathlib.Path(folder, "a", "b.txt").read_text()
      'whole'
    """
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file as `write_text` does; replaces a link in its place instead of following it.

    Raises:
      OSError: The file cannot be written; nothing is left behind.
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


def read_bytes(path: str | os.PathLike, limit: int = 2**30) -> bytes:
    """The content of a file that is not larger than a limit, which a device may be.

    A named pipe that no process writes to is empty.

    Args:
      path: The file to read.
      limit: Most bytes to read.

    Raises:
      ValueError: The file is larger.
      OSError: It cannot be read.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        os.set_blocking(file.fileno(), True)
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"file {os.fspath(path)!r} must have at most {limit} bytes, got more")
    return content


def _open_at_once(path: str | os.PathLike, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else a named pipe waits for a writer


class LockedError(RuntimeError):
    """Another process uses the folder; the message names it."""


@contextlib.contextmanager
def hold(folder: str | os.PathLike, *, patience: float = 1.0) -> Iterator[None]:
    """Keeps every other process out of a folder until the block ends.

    The kernel frees the lock when its process ends, however it ends, so no lock is ever stale. The
    file `lock` stays and names the last holder. The folder itself is locked as well, where its file
    system allows that, so that removing the file lets nobody in.

    A file system without locks gives a RuntimeWarning, and keeps nobody out.

    Args:
      folder: Made if it does not exist.
      patience: Seconds to wait for a holder that is about to end.

    Raises:
      LockedError: Another process holds the folder.
      OSError: The folder cannot be written to, or its `lock` is no regular file.

    Example:
      >>> with tempfile.TemporaryDirectory() as folder, hold(folder), hold(folder, patience=0):
      ...     pass  # doctest: +ELLIPSIS
      Traceback (most recent call last):
        ...
      lpa_jax.files.LockedError: ... is in use by process ... on ..., since ...
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _open_lock(folder / LOCK)
    itself = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + patience
        while not (_locked(descriptor, folder) and _locked(itself, folder)):
            if time.monotonic() >= deadline:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                raise LockedError(f"{folder} is in use by {holder or 'a process'}")
            time.sleep(0.05)
        os.ftruncate(descriptor, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        line = f"process {os.getpid()} on {socket.gethostname()}, since {since}\n"
        os.pwrite(descriptor, line.encode(), 0)
        yield
    finally:
        os.close(itself)
        os.close(descriptor)


def _open_lock(lock: pathlib.Path) -> int:
    """Descriptor of a regular file. A link is not followed: its target would be overwritten."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(lock, flags, 0o644)
    except OSError as error:
        if error.errno not in KINDS:
            raise
        kind = KINDS[error.errno]
    else:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return descriptor
        os.close(descriptor)
        kind = "a named pipe" if stat.S_ISFIFO(mode) else "a device or socket"
    raise OSError(errno.EINVAL, f"must be a regular file, got {kind}", str(lock))


def refuse_if_held(folder: str | os.PathLike) -> None:
    """Raises LockedError if another process holds the folder; makes no folder.

    Call it before work that a later `hold` would make useless.
    """
    if os.path.lexists(pathlib.Path(folder, LOCK)):
        with hold(folder):
            pass


def _locked(descriptor: int, folder: pathlib.Path) -> bool:
    """Whether nobody else has the lock, which is ours now where the file system has locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Only the file's lock matters: network file systems lock files, but no folders.
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            warnings.warn(
                f"{folder} cannot be locked ({error.strerror}): nothing keeps a second run out",
                RuntimeWarning,
                stacklevel=4,
            )
    return True
