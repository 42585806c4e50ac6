"""Starting, striking and comparing runs of `reliability_worker.py`."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

TESTS = pathlib.Path(__file__).parent
EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
PATIENCE = 120.0  # seconds until a run counts as hanging


class Zygote:
    """A process that forks runs, each a process of its own that saves the imports."""

    def __enter__(self):
        path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, str(TESTS / "reliability_worker.py"), "serve"],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *exception):
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._process.stdout.close()

    def ask(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, folder, *arguments, devices=1):
        """Begins a run in a folder."""
        log = pathlib.Path(folder).with_suffix(".log")
        log.unlink(missing_ok=True)
        flags = f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
        pid = self.ask(
            arguments=[str(folder), *arguments], log=str(log), environment={"XLA_FLAGS": flags}
        )
        return Run(self, pid, log)

    def finish(self, folder, *arguments, devices=1):
        """A run to its end; its lines."""
        run = self.start(folder, *arguments, devices=devices)
        assert run.wait() == 0, run.log.read_text()
        return run.lines()


class Run:
    """One running process."""

    def __init__(self, zygote, pid, log):
        self._zygote, self.pid, self.log = zygote, pid, log

    def lines(self):
        return self.log.read_text().splitlines() if self.log.exists() else []

    def wait_for(self, line, occurrence=1):
        """Waits for the n-th line that is this or goes on with a space; False if it ends before."""
        deadline = time.monotonic() + PATIENCE
        while sum(f"{found} ".startswith(f"{line} ") for found in self.lines()) < occurrence:
            if not pathlib.Path(f"/proc/{self.pid}/cmdline").read_bytes():  # a zombie
                return False
            assert time.monotonic() < deadline, self.lines()[-5:]
            time.sleep(0.001)
        return True

    def send(self, *signals):
        for number in signals:
            os.kill(self.pid, number)

    def wait(self):
        return self._zygote.ask(wait=self.pid)


def first_and_last_step(lines):
    """Numbers of the first and last step that a run began, or None without any."""
    steps = [int(line.split()[-1]) for line in lines if line.startswith("begin step")]
    return (steps[0], steps[-1]) if steps else None
