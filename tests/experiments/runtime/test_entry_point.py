"""How experiments end: one line and the exit status that docs/reliability.md promises."""

import importlib
import logging
import os
import re
import signal
import sys
from types import SimpleNamespace

import pytest

import experiments
from experiments import domain_generalization, long_tail
from experiments.runtime import console, hosts
from experiments.runtime import main as entry_point
from lpa_jax.checkpoints import checkpoints as checkpoint
from lpa_jax.files import LockedError
from lpa_jax.training import loop as trainer
from lpa_jax.training.interrupts import SIGNALS, InterruptedRunError, Interrupts
from tests.helpers.module_call import forget_flags


def end_of(work):
    with pytest.raises(SystemExit) as end:
        entry_point.run(["experiment"], work)
    return end.value.code


@pytest.mark.parametrize(
    "error",
    [
        ValueError("--flag: is wrong"),
        OSError("no such folder"),
        trainer.NonFiniteLossError("the training loss is nan at step 3"),
        checkpoint.CheckpointError("no checkpoint is intact"),
        LockedError("in use"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_status_1(error):
    def work(interrupts):
        raise error

    assert end_of(work) == f"error: {error}"  # Python prints it and exits with 1


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_that_was_asked_to_stop_exits_with_128_and_the_signal(number, capfd):
    def work(interrupts):
        with interrupts:
            signal.raise_signal(number)
            assert interrupts()
        raise InterruptedRunError("stopped, and what was done is saved")

    assert end_of(work) == 128 + number
    errors = capfd.readouterr().err
    assert f"{number.name}: saving at the next safe point" in errors


def test_a_terminal_that_closes_does_not_stop_what_ignores_it_as_under_nohup():
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupted:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_a_signal_counts_although_its_message_cannot_be_written():
    def notify(signal_name):
        raise BrokenPipeError

    with Interrupts(notify) as interrupted:
        signal.raise_signal(signal.SIGUSR1)
        assert interrupted()


def test_what_all_processes_raise_ends_them_together_each_with_its_line(capsys):
    def work(interrupts):
        raise hosts.DifferingHostsError("process 0 finds no checkpoint")

    assert end_of(work) == 1, "a status without words, for which `hosts.session` waits"
    assert capsys.readouterr().err == "error: process 0 finds no checkpoint\n"


def test_ctrl_c_outside_a_run_is_one_line_too(capsys, monkeypatch):
    def work(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry_point.os, "_exit", sys.exit)  # nothing of JAX is cut off here
    assert end_of(work) == 130
    assert capsys.readouterr().err == "interrupted: the same command resumes the run\n"
    assert started(monkeypatch, SimpleNamespace(__name__="a", define_flags=str, main=work)) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no cuda\nbackend")])
def test_devices_that_jax_does_not_find_are_one_line(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(entry_point.jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(SystemExit) as end:
        entry_point.check_devices()
    reason = " (no cuda)" if error.args else ""
    assert end.value.code == f"error: JAX_PLATFORMS=cuda: JAX finds no such device{reason}"


def test_ctrl_c_ends_imports_at_once_and_raises_afterwards(monkeypatch):
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(sys, "argv", ["-m"])  # as while Python looks for the module
        importlib.reload(experiments)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        entry_point.heed_ctrl_c()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_bug_is_not_hidden():
    def work(interrupts):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        entry_point.run(["experiment"], work)


def test_an_argument_that_is_no_flag_is_named_in_one_line():
    with pytest.raises(SystemExit) as stop:
        entry_point.run(["experiment", "more"], lambda interrupts: None)
    assert stop.value.code == (
        "error: unexpected argument 'more'; write flags as --name=value, lists with commas: "
        "--methods=erm,lpa"
    )


def started(monkeypatch, module, *arguments):
    """(exit status or message, standard output is captured) of a command line."""
    monkeypatch.setattr(console, "install", lambda: None)
    monkeypatch.setattr(entry_point, "_keep_memory", lambda: None)
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    try:
        with pytest.raises(SystemExit) as stop:
            entry_point.start(module.define_flags, module.main)
    finally:
        forget_flags()
    return stop.value.code


def test_figures_are_drawn_and_notes_about_absent_accelerators_dropped_whatever_is_set(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    importlib.reload(experiments)
    assert os.environ["MPLBACKEND"] == "agg"
    monkeypatch.setattr(logging.getLogger("jax"), "level", logging.NOTSET)
    assert started(monkeypatch, long_tail, "--help") == 0
    assert logging.getLogger("jax").level == logging.WARNING


@pytest.mark.parametrize("decided", [False, True])
@pytest.mark.parametrize("glibc", [False, True])
def test_freed_memory_is_kept_unless_the_user_decides(monkeypatch, glibc, decided):
    calls = {}
    library = SimpleNamespace(mallopt=calls.__setitem__) if glibc else object()
    monkeypatch.setattr(entry_point.ctypes, "CDLL", lambda name: library)
    for name in filter(lambda name: name.startswith("MALLOC_"), [*os.environ]):
        monkeypatch.delenv(name)
    if decided:
        monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    entry_point._keep_memory()
    assert calls == (entry_point.GLIBC_OPTIONS if glibc and not decided else {})


@pytest.mark.parametrize("word", ["--help", "--helpshort", "-h"])
def test_help_shows_the_flags_in_groups_and_exits_with_0(monkeypatch, capsys, word):
    assert started(monkeypatch, long_tail, "--epochs=3", word) == 0
    out = capsys.readouterr().out
    assert out.startswith("Long-tailed classification")
    titles = re.findall(r"^([A-Z][A-Za-z ]+):$", out, re.M)
    assert titles == ["What to compare", "Data", "Model", "Training", "LPA", "Saving", "Machines"]
    groups = dict(zip(titles, re.split(r"^[A-Z][A-Za-z ]+:$", out, flags=re.M)[1:], strict=True))
    for group, flag in {
        "What to compare": "--num_seeds=3", "Data": "--imbalance=100.0", "Model": "--model=mlp",
        "Training": "--epochs=60", "LPA": "--radius=", "Saving": "--checkpoint_every=5minutes",
        "Machines": "--multihost=false",
    }.items():  # fmt: skip
        assert f"\n  {flag}\n" in groups[group]


@pytest.mark.parametrize(
    ("module", "argument", "expected"),
    [
        (domain_generalization, "--epochs=3", "'epochs'. Did you mean: train_steps ?"),
        (long_tail, "--train_steps=3", "'train_steps'. Did you mean: epochs ?"),
        (long_tail, "--lr=3", "'lr'. Did you mean: learning_rate ?"),
        (long_tail, "--epoch=3", "'epoch'. Did you mean: epochs ?"),
        (domain_generalization, "--dataset=RotatedMNSIT", "(did you mean 'RotatedMNIST'?)"),
        (long_tail, "--epochs=a\nb", "error: flag --epochs=a b: invalid literal"),
    ],
)
def test_a_flag_of_another_name_is_one_line_with_the_one_that_is_meant(
    monkeypatch, module, argument, expected
):
    message = started(monkeypatch, module, argument)
    assert message.startswith("error: ") and expected in message and "\n" not in message


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.symlink_to("/dev/zero"), " must name a text file of at most 65536 "),
        (os.mkfifo, " must name a text file of at most 65536 "),
        (lambda path: path.write_bytes(b"\x89PNG\r\n"), " must name a text file of at most 65536 "),
        (lambda path: path.write_bytes(b"\0"), " must name a text file of at most 65536 "),
        (lambda path: path.write_text("# 8 byt\n" * 2**14), " must name a text file of at most "),
        (lambda path: path.write_text(f"--flagfile={path}"), " must not name itself, got '"),
        (os.mkdir, ": {path}: Is a directory"),
        (lambda path: None, ": {path}: No such file or directory"),
    ],
    ids=("device", "pipe", "binary", "zero", "large", "itself", "folder", "missing"),
)
@pytest.mark.parametrize("form", ["--flagfile={}", "-flagfile {}"])
def test_a_file_of_flags_that_is_none_is_one_line(monkeypatch, tmp_path, make, expected, form):
    make(path := tmp_path / "flags")
    message = started(monkeypatch, long_tail, "--epochs=3", *form.format(path).split())
    assert message.startswith("error: --flagfile" + expected.format(path=path))
    assert len(message) < 400 and "\n" not in message


def test_files_of_flags_may_name_others_and_what_comes_later_counts(monkeypatch, tmp_path):
    path = tmp_path / "flags"
    path.write_text(f"# a comment\n\n --epochs=4\r\n--flagfile={tmp_path}/more\n--seeds\n2\n")
    (tmp_path / "more").write_text("--model=cnn\n// a comment")
    words = entry_point.with_flagfiles(["x", "--flagfile", str(path), "--epochs=5", "--flagfile="])
    assert words == ["x", "--epochs=4", "--model=cnn", "--seeds", "2", "--epochs=5", "--flagfile="]
    words = ["x", "--", f"--flagfile={path}"]
    assert entry_point.with_flagfiles(words) == words
