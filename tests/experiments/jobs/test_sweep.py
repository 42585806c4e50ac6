"""Sweeps: one real one, and everything that can go wrong with processes that take no time."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from absl import flags

from experiments import sweep
from experiments.jobs import jobs, run_job
from experiments.reporting import runs
from experiments.runtime import main as entry_point
from lpa_jax.files import hold
from tests.helpers import made_up_runs, module_call

FLAGS = flags.FLAGS


def call(*arguments):
    """Runs the module as its command line would; the exit message or status, None if it ends well.

    Signal handlers are put back.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return module_call.run_main(sweep, *arguments)
    finally:
        signal.signal(signal.SIGTERM, handler)


def fake_start(script):
    """In place of `jobs.start`: runs Python with the job's folder as its argument."""

    def start(job, environment=None):
        return subprocess.Popen(
            [sys.executable, "-c", script, job.folder], env={**os.environ, **(environment or {})}
        )

    return start


@pytest.fixture
def unchecked(monkeypatch):
    """The flags of jobs are not checked, which takes a process of its own."""
    monkeypatch.setattr(run_job, "check_in_new_process", lambda experiment, arguments: None)


def finish(job):
    """Makes a job look as if it had been run."""
    folder = pathlib.Path(job.folder)
    made_up_runs.write(folder / "run" / "r", job.arguments[0].split("=")[1], job.seed, 0.5)
    outcome = {"exit_status": 0, "results": ["run/r"], "last_line": None}
    (folder / "outcome.json").write_text(json.dumps(outcome))


# The real thing


def sweep_of(methods, workdir, data_dir):
    return call(
        "--experiment=long_tail", f"--methods={methods}", "--num_seeds=1", f"--workdir={workdir}",
        "--set=imbalance=10", "--num_workers=2", "--", "--dataset=digits", "--epochs=1",
        f"--data_dir={data_dir}", "--compilation_cache=", "--hparams=none",
    )  # fmt: skip


def test_a_sweep_runs_its_jobs_and_reports_them(tmp_path, data_dir, capfd, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    message = sweep_of("erm", tmp_path / "sweep", data_dir)
    out, err = capfd.readouterr()
    assert message is None, err
    assert out.splitlines()[-1] == "1 jobs: 1 done" and "[1/1] " in err
    report = (tmp_path / "sweep" / "report" / "report.md").read_text()
    assert "| erm | 1 |" in report and "failed" not in report


@pytest.mark.slow
def test_a_sweep_names_the_job_that_failed(tmp_path, data_dir, capfd):
    workdir = tmp_path / "sweep"
    message = sweep_of("erm,lpa@hidden9", workdir, data_dir)
    out, err = capfd.readouterr()
    assert message == "1", err
    good, bad = (workdir / "jobs" / "imbalance=10" / m / "0" for m in ("erm", "lpa@hidden9"))
    assert jobs.is_done(good) and not jobs.is_done(bad)
    assert "unknown layer 'hidden9'" in (bad / "log.txt").read_text()
    failed = next(line for line in out.splitlines() if line.startswith("failed: "))
    assert "lpa@hidden9 seed 0" in failed and "unknown layer 'hidden9'" in failed
    assert out.splitlines()[-1] == "2 jobs: 1 done, 1 failed"
    assert "[2/2] " in err
    report = (workdir / "report" / "report.md").read_text()
    assert "| erm | 1 |" in report and "failed: error: " in report


# Descriptions


def test_a_flag_of_the_jobs_in_the_wrong_place_is_told_where_it_goes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep", "--dataset=cifar10"])
    try:
        with pytest.raises(SystemExit) as stop:
            entry_point.start(sweep.define_flags, sweep.main, sweep.HINT)
    finally:
        module_call.forget_flags()
    assert stop.value.code == (
        "error: Unknown command line flag 'dataset'; flags of the jobs go after --, as in: sweep "
        "--num_seeds=8 -- --dataset=cifar10"
    )


def test_every_combination_of_settings_methods_and_seeds_is_one_job(tmp_path):
    settings = {"imbalance": ["10", "100"], "model": ["mlp", "resnet8"]}
    made = jobs.plan(tmp_path, "long_tail", ["erm", "lpa"], [0, 3], settings, ["--epochs=5"])
    assert len({job.folder for job in made}) == len(made) == 2 * 2 * 2 * 2
    assert [job.seed for job in made[:8]] == [0] * 8, "seeds outermost: whole pairs first"
    assert made[-1].arguments == ("--methods=lpa", "--epochs=5", "--imbalance=100",
                                  "--model=resnet8")  # fmt: skip


def test_a_description_in_a_file_says_the_same_as_flags(tmp_path, monkeypatch, unchecked):
    seen = []
    monkeypatch.setattr(sweep, "run", lambda planned, executor: seen.append(planned) or [])
    content = {"experiment": "balanced", "methods": ["erm", "lpa"], "seeds": [4, 7],
               "set": {"per_class": [20, 50]}, "flags": ["--epochs=3"]}  # fmt: skip
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(content))
    workdir = f"--workdir={tmp_path / 'jobs'}"
    call(f"--description={path}", workdir)
    call("--experiment=balanced", "--methods=erm,lpa", "--seeds=4,7", "--set=per_class=20,50",
         workdir, "--", "--epochs=3")  # fmt: skip
    assert seen[0] == seen[1] and len(seen[0]) == 8


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set=imbalance"], "--set must be FLAG=VALUE,VALUE"),
        (["--set=imbalance=10,,100"], "--set must be FLAG=VALUE,VALUE"),
        (["--set=a=1", "--set=a=2"], "--set must name a flag once, got 'a' twice"),
        (["--set=seeds=3"], "the sweep itself decides --seeds"),
        (["--set=num_seeds=3"], "the sweep itself decides --num_seeds"),
        (["--seeds=100"], "write --num_seeds=100 for 100 seeds, --seeds=100-100 for the one seed"),
        (["--methods=erm,erm"], "--methods must name different methods"),
        (["--seeds=x"], "--seeds must be whole numbers"),
        (["--num_workers=0"], "--num_workers must be a whole number in 1..10000, got 0"),
        (["stray"], "unexpected argument 'stray'"),
        (["--baseline=emr"], "--baseline: --methods: unknown method 'emr'"),
        (
            ["--description=/nowhere.json"],
            "--description must name a file with a JSON object, got '/nowhere.json'",
        ),
        (["--description=x", "--num_seeds=1"], "--num_seeds and --description say the same"),
        (["--cluster=debug", "--slurm=gpus"], "--slurm must be NAME=VALUE"),
        (["--cluster=debug", "--slurm=gpu=1"], "--slurm: "),
        (["--cluster=slurm"], "--cluster=slurm: Could not detect"),
    ],
)
def test_bad_input_is_one_line_and_no_job_starts(
    tmp_path, monkeypatch, unchecked, arguments, expected
):
    monkeypatch.setattr(jobs, "start", lambda job: pytest.fail("a job started"))
    message = call(f"--workdir={tmp_path / 'sweep'}", *arguments)
    assert expected in message and "\n" not in message
    assert not (tmp_path / "sweep").exists()


def test_a_file_of_flags_decides_nothing_that_the_sweep_decides(tmp_path, unchecked):
    (tmp_path / "flags").write_text("--epochs=3\n--methods=lpa\n")
    message = call(f"--workdir={tmp_path / 'jobs'}", "--", f"--flagfile={tmp_path / 'flags'}")
    assert message == "error: the sweep itself decides --methods of its jobs"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seeds": "3"}, 'seeds must be a list, got "3"'),
        ({"seeds": [-1]}, "seeds[0] must be a whole number"),
        ({"seeds": []}, "seeds must not be empty"),
        ({"sets": {}}, "sets must be a known field"),
        ({"methods": ["erm", 3]}, "methods[1] must be printable text"),
        ({"set": {"imbalance": 10}}, "set.imbalance must be a list"),
        ({"methods": None}, "methods must be a list"),
    ],
)
def test_a_wrong_description_is_refused_by_key(tmp_path, unchecked, change, expected):
    path = tmp_path / "sweep.json"
    content = {"experiment": "long_tail", "methods": ["erm"], "seeds": [0]} | change
    path.write_text(json.dumps(content))
    assert expected in call(f"--description={path}", f"--workdir={tmp_path / 'jobs'}")


@pytest.mark.parametrize(
    ("experiment", "arguments", "expected"),
    [
        ("long_tail", ["--imbalence=3"], "Unknown command line flag 'imbalence'"),
        ("long_tail", ["--flagfile=/dev/zero"], "--flagfile must name a text file of at most "),
        ("long_tail", ["--epochs=many"], "--epochs=many"),
        ("long_tail", ["--methods=lpaa"], "unknown method 'lpaa'"),
        ("reporting", [], "--experiment must be one of .*, got 'reporting'"),
        ("nonsense", [], "--experiment must be one of .*, got 'nonsense'"),
        ("longtail", [], r"got 'longtail' \(did you mean 'long_tail'\?\)"),
        ("long_tail", ["--methods=lpa", "--option=dropout.rate=1"], "--option=.* reaches no"),
    ],
)
def test_flags_of_jobs_are_refused_before_any_starts(experiment, arguments, expected):
    before = set(FLAGS)
    run_job.check("long_tail", [["--imbalance=3"]])
    run_job.check("long_tail", [[f"--methods={m}", "--lpl_radius=3"] for m in ("erm", "lpl")])
    with pytest.raises(ValueError, match=expected):
        run_job.check(experiment, [arguments])
    assert set(FLAGS) == before, "flags of an experiment must not outlive the check"


# Done, interrupted, running


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, "130"), (signal.SIGTERM, "143")])
def test_a_sweep_that_is_told_to_stop_says_so_and_exits_as_documented(
    tmp_path, monkeypatch, unchecked, capsys, number, status
):
    monkeypatch.setattr(jobs, "run_here", lambda *arguments: signal.raise_signal(number))
    assert call("--methods=erm", "--num_seeds=1", f"--workdir={tmp_path / 'sweep'}") == status
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line == "interrupted: finished jobs are kept, the same command resumes it"


def test_a_job_is_done_only_while_its_result_is_whole(planned):
    job, folder = planned[0], pathlib.Path(planned[0].folder)
    assert not jobs.is_done(folder)
    finish(job)
    assert jobs.is_done(folder)
    result = folder / "run" / "r" / "result.json"
    whole = result.read_text()
    result.write_text(whole[: len(whole) // 2])
    assert not jobs.is_done(folder), "cut in half"
    result.write_text(whole)
    (folder / "outcome.json").write_text('{"exit_status": 1, "results": ["run/r"]}')
    assert not jobs.is_done(folder), "the job failed after its result"


def test_finished_jobs_are_skipped_and_the_others_run(tmp_path, planned, monkeypatch, unchecked,
                                                      capsys):  # fmt: skip
    finish(planned[0])
    started = []
    start = fake_start("pass")
    monkeypatch.setattr(jobs, "start", lambda job, env=None: started.append(job) or start(job))
    call("--methods=erm,lpa", "--seeds=4,", "--set=imbalance=10,100", f"--workdir={tmp_path}")
    assert not started, "--seeds=4, is refused"
    call("--methods=erm,lpa", "--num_seeds=2", "--set=imbalance=10,100", f"--workdir={tmp_path}")
    assert len(started) == 2 * 2 * 2 - 1 and planned[0] not in started
    assert "8 jobs: 7 done, 1 done before" in capsys.readouterr().out


def test_other_flags_in_the_same_workdir_are_refused_and_nothing_is_written(planned, tmp_path):
    changed = [job._replace(arguments=(*job.arguments, "--epochs=9")) for job in planned]
    extra = planned[0]._replace(folder=str(tmp_path / "new"))
    with pytest.raises(
        ValueError, match=r"holds a job with other flags .*choose another --workdir"
    ):
        jobs.prepare([extra, *changed])
    assert not (tmp_path / "new").exists()
    jobs.prepare(planned)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # A flag of an earlier release.
        ({"experiment": "long_tail", "arguments": ["--methods=erm", "--gone=1"]}, "flag 'gone'"),
        ({"arguments": []}, "experiment must be printable text, got nothing"),
    ],
)
def test_a_job_of_another_release_that_cannot_run_is_refused_in_one_line(
    planned, capfd, content, expected
):
    folder = pathlib.Path(planned[0].folder)
    (folder / "job.json").write_text(json.dumps({"name": "x", "seed": 1} | content))
    assert run_job._run_locked(folder) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and expected in line
    assert json.loads((folder / "outcome.json").read_text())["last_line"] == line
    assert not jobs.is_done(folder)


def test_a_running_job_is_left_alone(planned):
    folder = pathlib.Path(planned[0].folder)
    (folder / "log.txt").write_text("busy")
    with hold(folder):
        assert run_job.run(folder) == jobs.LOCKED
    assert (folder / "log.txt").read_text() == "busy"
    assert jobs.outcome_of(planned[0], jobs.LOCKED).status == "running"


def test_sigterm_before_training_ends_a_job_even_where_exceptions_are_swallowed(
    planned, monkeypatch
):
    """As in JAX's callback of the garbage collector, where a real `scancel` was lost."""
    left = []
    monkeypatch.setattr(os, "_exit", left.append)

    def swallow(folder):
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(run_job, "run", swallow)
    before = signal.getsignal(signal.SIGTERM)
    try:
        run_job.main(["run_job", planned[0].folder])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left == [jobs.INTERRUPTED]


def test_the_claim_of_a_dead_process_does_not_hold(planned):
    folder = pathlib.Path(planned[0].folder)
    script = f"""
import time
from lpa_jax.files import hold
with hold({str(folder)!r}):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    assert run_job.run(folder) == jobs.LOCKED
    holder.kill()
    holder.communicate()
    finish(planned[0])
    assert run_job.run(folder) == 0, "free again, and done: nothing left to run"


def test_a_failed_job_shows_the_last_line_of_its_log(planned):
    log = pathlib.Path(planned[0].folder) / "log.txt"
    assert jobs.outcome_of(planned[0], 1).detail == "no log"
    log.write_text("warming up\nerror: --epochs must be >= 1\n\n")
    assert jobs.outcome_of(planned[0], 1) == (planned[0], "failed", "error: --epochs must be >= 1")
    assert jobs.outcome_of(planned[0], -9).detail.startswith("killed by SIGKILL; last line: error")


def test_a_failed_job_stands_in_the_report_and_a_repeated_one_does_not(tmp_path, planned):
    folder = pathlib.Path(planned[0].folder)
    (folder / "outcome.json").write_text('{"exit_status": 1, "last_line": "error: no such layer"}')
    assert runs.collect([tmp_path])[1] == [(folder, "failed: error: no such layer")]
    finish(planned[0])
    assert runs.collect([tmp_path])[1] == []


# Processes


def test_workers_run_at_once_take_devices_in_turn_and_report_each_end(planned, monkeypatch):
    script = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], "device").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
deadline = time.monotonic() + 20
# Ends when the other worker's job has begun as well.
while len(list(pathlib.Path(sys.argv[1]).parents[2].rglob("device"))) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.01)
sys.exit(3 if "lpa" in sys.argv[1] else 0)
"""
    monkeypatch.setattr(jobs, "start", fake_start(script))
    ends = []
    outcomes = jobs.run_here(planned, 2, ["5", "6"], ends.append)
    assert sorted(outcome.status for outcome in outcomes) == ["done", "done", "failed", "failed"]
    assert ends == outcomes
    devices = [pathlib.Path(job.folder, "device").read_text() for job in planned[:2]]
    assert sorted(devices) == ["5", "6"]


def test_an_interrupt_stops_the_children_and_starts_no_other(planned, monkeypatch):
    script = "import pathlib, sys, time; pathlib.Path(sys.argv[1], 'up').touch(); time.sleep(60)"
    start, started = fake_start(script), []
    monkeypatch.setattr(jobs, "start", lambda job, env=None: started.append(start(job)) or
                        started[-1])  # fmt: skip
    main = threading.get_ident()

    def interrupt_when_up():
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if all(pathlib.Path(job.folder, "up").exists() for job in planned[:2]):
                break
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt_when_up)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        jobs.run_here(planned, 2)
    thread.join()
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2


def test_a_child_that_does_not_listen_is_killed_after_the_grace(monkeypatch):
    script = ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
              "print(flush=True); time.sleep(60)")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    process.stdout.readline()
    monkeypatch.setattr(jobs, "GRACE_SECONDS", 0.1)
    with contextlib.closing(process.stdout):
        jobs.stop([process])
    assert process.returncode == -signal.SIGKILL
