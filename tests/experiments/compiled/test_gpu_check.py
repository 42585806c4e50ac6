"""The script for a lent GPU: its commands, its time limits, its report."""

import pytest
from absl import flags

from experiments import gpu_check
from tests.helpers import commands
from tests.helpers.module_call import call

FLAGS = flags.FLAGS


@pytest.mark.parametrize("small", ["--small", "--nosmall"])
def test_every_command_is_understood_and_all_end_within_eight_minutes(tmp_path, small):
    with commands.parsed(gpu_check, [small, f"--workdir={tmp_path}/a folder"]):
        parts = gpu_check.parts("cuda")
    assert sum(part.seconds for part in parts) <= 8 * 60
    for part in parts:
        for test in part.command.split() if part.command.startswith("pytest") else ():
            assert not test.endswith(".py") or (gpu_check.ROOT / test).is_file()
        if part.command.startswith("experiments."):
            tiny = part.small if small == "--small" else ""
            commands.check(f"python -m {part.command} {tiny}", tmp_path)


def test_a_part_at_its_limit_is_interrupted_and_the_next_one_reported(tmp_path, monkeypatch):
    parts = (
        gpu_check.Part("endless", 1, "timeit -n1 -r1 while(1):pass"),
        gpu_check.Part("failing", 9, "no_such_module"),
        gpu_check.Part("good", 9, "timeit -n1 -r1 print(1234)"),
    )
    monkeypatch.setattr(gpu_check, "parts", lambda platform: parts)
    message, out = call(gpu_check, f"--workdir={tmp_path}")
    assert message.startswith("error: endless, failing did not end well; see ")
    report = (tmp_path / gpu_check.REPORT).read_text(encoding="utf-8")
    for text, lines in ((out, out.splitlines()), (report, report.splitlines())):
        starts = [line.removeprefix("## ") for line in lines]
        for outcome in ("endless: interrupted, ", "failing: exit status 1, ", "good: ok, "):
            assert any(line.startswith(outcome) for line in starts), text
    assert "No module named no_such_module" in report and "\n1234\n" in report


@pytest.mark.slow
def test_all_parts_run_in_miniature(tmp_path, data_dir):
    message, out = call(gpu_check, "--small", f"--workdir={tmp_path}", f"--data_dir={data_dir}")
    assert message is None, (tmp_path / gpu_check.REPORT).read_text(encoding="utf-8")
    assert out.count(": ok, ") == 6
