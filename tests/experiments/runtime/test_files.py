"""Paths that flags name, and JSON files of ours."""

import pytest
from absl import flags

from experiments.runtime import files


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
