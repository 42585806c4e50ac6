"""Console output that cannot be written changes nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.runtime import console
from tests.helpers.paths import ROOT


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


def reader_gone():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def reader_asleep():
    _reader, writer = os.pipe()
    os.set_blocking(writer, False)
    while True:
        try:
            os.write(writer, bytes(4096))
        except BlockingIOError:
            break
    os.set_blocking(writer, True)
    return writer


@pytest.mark.parametrize("broken", [full_disk, reader_gone, reader_asleep])
@pytest.mark.parametrize("buffered", [False, True])
def test_what_cannot_be_written_is_dropped(broken, buffered, monkeypatch):
    monkeypatch.setattr(console, "_stopping", True)  # else a reader that sleeps is waited for
    file = console.stream(broken(), buffered=buffered)
    print("line", "x" * 10_000, file=file)
    file.flush()
    file.close()


def test_everything_is_written_in_order_and_letters_that_the_encoding_lacks_are_escaped(capfd):
    text = "a" * 10_000 + "\n"
    with console.stream(os.dup(1)) as file:
        file.write(text)
        file.reconfigure(encoding="ascii", errors=file.errors)
        file.write("│\n")
    assert capfd.readouterr().out == text + "\\u2502\n"


PROGRAM = """
import sys
from experiments.runtime import main as entry_point
from lpa_jax.training.interrupts import InterruptedRunError
def work(interrupts):
    with interrupts:
        open("ready", "w").close()
        while not interrupts():
            print("progress")
            print("progress", file=sys.stderr)
    open("saved", "w").close()
    raise InterruptedRunError("stopped")
entry_point.start(lambda: None, lambda argv: entry_point.run(argv, work))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirect", "name"),
    [
        ("2>&1 | head -1", "SIGHUP"),
        (">/dev/full 2>&1", "SIGUSR1"),
        (">&- 2>&-", "SIGTERM"),
        ("2>&1 | sleep 30", "SIGINT"),  # a pager that stops reading
    ],
)
def test_a_signal_saves_and_has_its_exit_status_whatever_the_console_is(redirect, name, tmp_path):
    number = signal.Signals[name]
    line = f'{{ "$PY" -c "$PROGRAM" & echo $! > pid; wait $!; echo $? > status; }} {redirect}'
    environment = {**os.environ, "PY": sys.executable, "PROGRAM": PROGRAM, "PYTHONPATH": str(ROOT)}
    # Jobs in the background of a shell without job control ignore SIGINT.
    # A session under nohup ignores SIGHUP, and so would the run. Python's `preexec_fn` forks this
    # process, of which JAX warns where another test of this worker has used it.
    heed_hangup = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
        "os.execvp('bash', ['bash', '-mc', sys.argv[1]])"
    )
    shell = subprocess.Popen(
        [sys.executable, "-c", heed_hangup, line], cwd=tmp_path, env=environment
    )
    while not (tmp_path / "ready").exists():
        assert shell.poll() is None
        time.sleep(0.05)
    os.kill(int((tmp_path / "pid").read_text()), number)
    while not (tmp_path / "status").exists() or not (tmp_path / "status").read_text():
        time.sleep(0.05)
    shell.kill()
    shell.wait()
    assert (tmp_path / "saved").exists()
    assert int((tmp_path / "status").read_text()) == 128 + number


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "report {results} --output={out}",
        "prefetch_benchmark --model=mlp --image_size=4 --file_size=8 --images=9 --batch_size=4 "
        "--steps=2 --rounds=2",
        "sweep --methods=erm --num_seeds=1 --workdir={out} -- --dataset=digits --imbalance=10 "
        "--epochs=1 --hparams=none --compilation_cache=",
    ],
)
def test_commands_around_training_end_well_whatever_the_console_is(command, tmp_path):
    words = command.format(results=ROOT / "results/long_tail/mlp", out=tmp_path / "out").split()
    words = [sys.executable, "-m", f"experiments.{words[0]}", *words[1:]]
    for broken in ((full_disk(), reader_gone()), (reader_gone(), full_disk())):
        assert subprocess.run(words, cwd=ROOT, stdout=broken[0], stderr=broken[1]).returncode == 0
