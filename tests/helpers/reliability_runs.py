"""Starting, striking and comparing runs of `reliability_worker.py`."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from tests.helpers import hosts

EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
PATIENCE = 600.0  # seconds until a run counts as hanging; the machine may be busy


class Zygote:
    """A process that forks runs, each a process of its own that saves the imports.

    `module` is what runs: `reliability_worker`, or `reliability_experiment` for two processes.
    """

    def __init__(self, module="reliability_worker"):
        self._module = f"tests.helpers.{module}"

    def __enter__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.reliability_zygote", self._module],
            env={**os.environ, "PYTHONPATH": hosts.PYTHON_PATH},
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
        # Compiled as in this process, which may go on with the run itself.
        return self._fork([str(folder), *arguments], log, XLA_FLAGS=hosts.xla_flags(devices))

    def start_hosts(self, workdir, *arguments, paces=("0", "0"), elsewhere=None):
        """Begins the two processes of an experiment; see `reliability_experiment.py`.

        `elsewhere` is what the second takes for the workdir where the two share none.
        """
        workdirs = (workdir, elsewhere or workdir)
        coordinator = f"127.0.0.1:{hosts.free_port()}"
        return [
            self._fork(
                [*paces, f"--workdir={folder}", f"--coordinator_address={coordinator}",
                 "--num_processes=2", f"--process_id={process}", *arguments],
                pathlib.Path(f"{folder}.{process}.log"),
                XLA_FLAGS=hosts.xla_flags(),
            )
            for process, folder in enumerate(workdirs)
        ]  # fmt: skip

    def _fork(self, arguments, log, **environment):
        log.unlink(missing_ok=True)
        pid = self.ask(arguments=arguments, log=str(log), environment=environment)
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


def finish_hosts(zygote, workdir, *arguments):
    """An experiment of two processes to its end."""
    runs = zygote.start_hosts(workdir, *arguments)
    for run in runs:
        assert run.wait() == 0, run.lines()


def strike_hosts(zygote, workdir, *arguments, phase, struck, signals, paces):
    """Sends signals to one of two processes in a phase; both stop as documented.

    Returns the numbers of the first and the last step that they made, or None without any.
    """
    runs = zygote.start_hosts(workdir, *arguments, paces=paces)
    seen_by = runs[0 if phase == "begin save" else struck]  # process 0 alone saves
    assert seen_by.wait_for(phase), seen_by.lines()
    runs[struck].send(*signals)
    statuses = [run.wait() for run in runs]
    expected = [143, 143]
    expected[struck] = EXIT_STATUS[signals[0]]
    assert statuses == expected, [run.lines() for run in runs]
    for run in runs:
        # JAX says in a thread of its own, at any time, that it was told of the signal.
        own = [line for line in run.lines() if "preemption_notifier.cc" not in line]
        assert own[-1].endswith("; the same command resumes it"), run.lines()
    steps = [first_and_last_step(run.lines()) for run in runs]
    assert steps[0] == steps[1], "both do the same steps"
    return steps[0]


def first_and_last_step(lines):
    """Numbers of the first and last step that a run began, or None without any."""
    steps = [int(line.split()[-1]) for line in lines if line.startswith("begin step")]
    return (steps[0], steps[-1]) if steps else None
