"""One run at a time in a working folder."""

import contextlib
import fcntl
import os
import pathlib
import socket
import stat
import time
from collections.abc import Iterator

NAME = "lock"


class LockedError(RuntimeError):
    """Another process works in the folder; the message names it."""


@contextlib.contextmanager
def hold(folder: str | os.PathLike, *, patience: float = 1.0) -> Iterator[None]:
    """Keeps every other process out of a folder until the block ends.

    The kernel drops the lock with the process that holds it, however that died, so there are no
    stale locks; the file `lock` stays and says who came last. The folder itself is locked, too,
    where its file system can do that, so that removing the file lets nobody in.

    Args:
      folder: made if it is not there.
      patience: seconds to wait for a holder that is just dying.

    Raises:
      LockedError: another process holds the folder.
      OSError: the folder cannot be written to, or its `lock` is a symbolic link.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, hold(folder), hold(folder, patience=0):
    ...     pass  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    lpa_jax.workdir_lock.LockedError: ... is in use by process ... on ..., since ...
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Never through a link: what it points to would be written over.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder / NAME, flags, 0o644)
    itself = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + patience
        while not (_locked(descriptor) and _locked(itself)):
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


def refuse_if_held(folder: str | os.PathLike) -> None:
    """Raises LockedError if another process holds the folder; makes no folder.

    For an early answer, before work that a later `hold` would find was in vain.
    """
    if pathlib.Path(folder, NAME).exists():
        with hold(folder):
            pass


def _locked(descriptor: int) -> bool:
    """Whether the lock is ours now; a folder that cannot be locked (NFS) stands in nobody's way."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return stat.S_ISDIR(os.fstat(descriptor).st_mode)
    return True
