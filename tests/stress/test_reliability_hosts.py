"""A signal to either of two processes stops both at one step, saved; both go on bit for bit."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.stress
TESTS = pathlib.Path(__file__).parent.parent


def launch(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return [
        subprocess.Popen(
            [sys.executable, str(TESTS / "reliability_hosts.py"), coordinator, process, folder],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in ("0", "1")
    ]


def finish(folder):
    processes = launch(folder)
    last_lines = []
    for process in processes:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
        last_lines.append(out.splitlines()[-1])
    assert last_lines[0] == last_lines[1]
    return last_lines[0]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    line = finish(tmp_path_factory.mktemp("hosts") / "whole")
    assert line.startswith("finished ")
    return line


@pytest.mark.parametrize(
    ("number", "times", "struck"),
    [
        (signal.SIGTERM, 1, 0),
        (signal.SIGTERM, 2, 1),
        (signal.SIGINT, 1, 1),
        (signal.SIGINT, 2, 0),
    ],
)
def test_a_signal_to_one_process_stops_both_and_both_go_on(
    reference, tmp_path, number, times, struck
):
    processes = launch(tmp_path / "run")
    try:
        steps = 0
        while steps < 8:
            line = processes[struck].stdout.readline()
            assert line, processes[struck].stderr.read()[-2000:]
            steps += line == "step\n"  # Gloo prints, too
        for _ in range(times):
            processes[struck].send_signal(number)
        for process in processes:
            process.communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
    assert processes[struck].returncode == 128 + number
    assert processes[1 - struck].returncode == 143
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "run").glob("step_*"))
    assert 8 <= steps[-1] < 24
    assert finish(tmp_path / "run") == reference
