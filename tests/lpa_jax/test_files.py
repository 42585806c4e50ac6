"""Whole files, and folders that one process at a time may use."""

import errno
import fcntl
import os

import pytest

from lpa_jax import files


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_not_in_use(tmp_path, monkeypatch, code):
    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / files.LOCK).touch()
    said = rf"cannot be locked \({os.strerror(code)}\): nothing keeps a second run out"
    with pytest.warns(RuntimeWarning, match=said):
        files.refuse_if_held(tmp_path)


def test_a_folder_that_is_held_is_refused_and_free_again_afterwards(tmp_path):
    refused = pytest.raises(files.LockedError, match=f"is in use by process {os.getpid()} on ")
    with files.hold(tmp_path), refused:
        files.refuse_if_held(tmp_path)
    files.refuse_if_held(tmp_path)


def test_a_file_above_the_limit_is_refused_and_one_at_the_limit_is_read(tmp_path):
    files.write_bytes(tmp_path / "whole", b"12345")
    assert files.read_bytes(tmp_path / "whole", limit=5) == b"12345"
    with pytest.raises(ValueError, match=r"whole' must have at most 4 bytes, got more"):
        files.read_bytes(tmp_path / "whole", limit=4)


def test_a_pipe_is_read_and_not_waited_for_if_nobody_writes_to_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert files.read_bytes(tmp_path / "pipe") == b""
    reader, writer = os.pipe()  # as of the shell's <(command)
    os.write(writer, b"list")
    os.close(writer)
    assert files.read_bytes(f"/dev/fd/{reader}") == b"list"
    os.close(reader)
