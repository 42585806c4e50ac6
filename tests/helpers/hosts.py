"""Starts, ends and watches the processes of `hosts_worker.py`."""

import os
import signal
import socket
import subprocess
import sys
import time

from tests.helpers.paths import ROOT

HEARTBEAT = 6
PYTHON_PATH = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
_COMPILED = os.environ.get("XLA_FLAGS", "")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def xla_flags(devices=1):
    """Compiles as in this process, for so many CPU devices."""
    return f"{_COMPILED} --xla_force_host_platform_device_count={devices}"


def environment(devices=1):
    """That of a worker with so many CPU devices."""
    return {
        **os.environ,
        "PYTHONPATH": PYTHON_PATH,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "XLA_FLAGS": xla_flags(devices),
    }


def launch(task, count, arguments, only=None, devices=1):
    """Starts processes 0..count-1 of a run (or `only` some of them), `devices` CPU devices each."""
    coordinator = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.helpers.hosts_worker", task, coordinator,
             str(count), str(process), *arguments(process)],
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in (range(count) if only is None else only)
    ]  # fmt: skip


def outcome(process, timeout):
    """(exit status, stdout, stderr) of a process that must end within `timeout` seconds."""
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, errors


def check_fault(number, fault, fail_at=None):
    """Does `fault` to process `number` of two; the other ends soon, non-zero, with one plain line.

    `fault` is a signal, or None where the process raises an exception by itself.
    """

    def arguments(process):
        return [str(HEARTBEAT), *([str(fail_at)] if process == number and fail_at else [])]

    processes = launch("loop", 2, arguments)
    faulty, other = processes[number], processes[1 - number]
    try:
        for process in processes:
            # Gloo says on standard output how many peers it has found.
            assert any(line == "ready\n" for line in process.stdout), process.stderr.read()
        started = time.monotonic()
        if fault is not None:
            faulty.send_signal(fault)
        status, _, errors = outcome(other, timeout=HEARTBEAT + 20)
        assert time.monotonic() - started < HEARTBEAT + 5
        assert status != 0
        assert errors.count("\n") == 1 and "lost the connection to another process" in errors, (
            errors
        )
        if fault is None:
            status, _, errors = outcome(faulty, timeout=5)
            assert status == 1 and errors == "error: something broke\n"
        if fault == signal.SIGSTOP:
            faulty.send_signal(signal.SIGCONT)
            status, _, errors = outcome(faulty, timeout=HEARTBEAT + 5)
            assert status != 0 and errors.count("\n") == 1, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()


def check_absent_peer(number):
    """Starts process `number` of two alone; it waits as long as asked and ends with one line."""
    (process,) = launch("loop", 2, lambda process: [str(HEARTBEAT)], only=[number])
    assert process.stdout.readline() == "joins\n"
    started = time.monotonic()
    status, _, errors = outcome(process, timeout=60)
    assert time.monotonic() - started < HEARTBEAT + 5
    assert status != 0
    assert (
        errors == f"error: not all processes joined within --initialization_timeout={HEARTBEAT} s\n"
    )
