"""Paths that flags name, and JSON files of ours."""

import os
import stat

import pytest
from absl import flags

from experiments.runtime import files
from experiments.runtime import main as entry_point
from lpa_jax.files import hold


@pytest.fixture
def parsed():
    """Parses arguments with the flags `workdir`, a folder, and `cache`, which may be empty."""
    FLAGS = flags.FLAGS
    files.define_path("workdir", "runs/a", "", folder=True)
    files.define_path("cache", "", "", folder=True, optional=True)

    def parse(*arguments):
        FLAGS(["experiment", *arguments])
        files.check_folders()
        return FLAGS.workdir

    yield parse
    for name in ("workdir", "cache"):
        delattr(FLAGS, name)
    FLAGS.unparse_flags()


def test_a_tilde_is_the_home_folder(parsed, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parsed() == "runs/a"
    assert parsed("--workdir=~/runs/b") == "/home/me/runs/b"


@pytest.mark.parametrize(
    "text",
    ["", " ", "s3://bucket/runs", "file:///a", "~nobody_at_all/a", "\udcff", "a\0b", "{file}/a"],
)
def test_what_is_no_folder_of_this_machine_is_refused(parsed, text, tmp_path):
    (tmp_path / "file").touch()
    text = text.replace("{file}", str(tmp_path / "file"))
    for name in ("workdir", "cache") if text else ("workdir",):
        with pytest.raises((flags.IllegalFlagValueError, ValueError), match=f"--{name}.*must.*got"):
            parsed("--workdir=a", f"--{name}={text}")


def test_a_folder_that_may_not_be_written_to_is_refused_unless_it_is_a_cache(parsed, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match=r"^--workdir must name a folder that can be written to, "):
        parsed("--workdir=a")
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).endswith("cache"))
    assert parsed("--workdir=a", "--cache=a/cache") == "a"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (os.mkfifo, "/lock: must be a regular file, got a named pipe"),
        (os.mkdir, "/lock: must be a regular file, got a folder"),
        (
            lambda lock: os.mknod(lock, stat.S_IFSOCK),
            "/lock: must be a regular file, got a device or socket",
        ),
        (lambda lock: os.symlink("a", lock), "/lock: must be a regular file, got a symbolic link"),
    ],
)
def test_a_lock_of_another_kind_is_one_line_with_the_flag(parsed, tmp_path, make, expected):
    parsed(f"--workdir={tmp_path}")
    make(tmp_path / "lock")
    with pytest.raises(OSError, match="regular") as refused, hold(tmp_path):
        pass
    assert entry_point.refusal(refused.value) == f"error: --workdir: {tmp_path}{expected}"


def test_the_system_s_refusal_names_the_flag_of_the_folder(parsed):
    parsed("--workdir=/proc/no/where")
    with pytest.raises(OSError, match="No such") as refused, hold("/proc/no/where"):
        pass
    assert entry_point.refusal(refused.value) == (
        "error: --workdir: /proc/no: No such file or directory"
    )
    assert entry_point.refusal(FileNotFoundError(2, "gone", "/other")) == (
        "error: [Errno 2] gone: '/other'"
    )
