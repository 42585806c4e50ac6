r"""Methods x seeds x settings as jobs, on this machine or on a Slurm cluster.

    python -m experiments.sweep --experiment=long_tail --methods=erm,lpl,lpa --seeds=8 \
        --set imbalance=10,100 --set model=mlp,small_cnn --num_workers=2 -- --epochs=60

Each job is one run of the experiment module, with its own log. Flags after `--` go to every job;
`--set flag=a,b` runs all combinations. Values that hold commas, or a sweep to keep in a file:
`--description=sweep.json` with {"experiment": "long_tail", "methods": ["erm"], "seeds": [0, 1],
"set": {"milestones": ["0.3,0.6", "0.5"]}, "flags": ["--epochs=60"]}.

Given again, the same command skips what is done, goes on with what was interrupted or failed, and
leaves alone what another process is running; several sweeps may share a --workdir. The report of
all results stands in WORKDIR/report. Slurm: `--cluster=slurm --slurm=slurm_partition=gpu
--slurm=gpus_per_node=1 --slurm=timeout_min=240` (parameters of submitit, extra `slurm`).
"""

import collections
import json
import pathlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import app, flags

from experiments import report
from experiments.jobs import jobs
from experiments.jobs import slurm as cluster
from experiments.runtime import files
from experiments.training import flags as run_flags

FLAGS = flags.FLAGS
CLUSTERS = ("none", "slurm", "local", "debug")


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, which ends a sweep as cleanly as Ctrl-C."""


class Sweep(NamedTuple):
    """What is to be run."""

    experiment: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Sequence[str]]
    common: tuple[str, ...]


def define_flags() -> None:
    """Flags of this module."""
    flags.DEFINE_string("experiment", "long_tail", "Module of experiments that jobs run.")
    flags.DEFINE_list("methods", ["erm", "lpl", "lpa", "lpa+lpl"], "Methods to run.")
    flags.DEFINE_list("seeds", ["8"], f"{run_flags.SEEDS}.")
    flags.DEFINE_multi_string("set", [], "FLAG=VALUE,VALUE: a flag of the jobs and its values.")
    flags.DEFINE_string("description", None, "JSON file in place of the four flags above.")
    flags.DEFINE_string("workdir", "runs/sweep", "Folder of the jobs and their report.")
    flags.DEFINE_integer("num_workers", 1, "Jobs at once; with --cluster, at most that many.")
    flags.DEFINE_list("gpus", [], "Devices that workers take in turn, such as 0,1; empty: all.")
    flags.DEFINE_enum(
        "cluster", "none", CLUSTERS, "none: processes here; else submitit's executor of that name."
    )
    flags.DEFINE_multi_string("slurm", [], "NAME=VALUE: a parameter of submitit's executor.")
    flags.DEFINE_string("baseline", "erm", "Baseline of the report.")
    flags.DEFINE_bool("quiet", False, "No line for each job, only the report and the counts.")


def from_flags(common: Sequence[str]) -> Sweep:
    """The sweep that the flags describe.

    Raises:
      ValueError: naming the flag.
    """
    settings = {}
    for text in FLAGS.set:
        name, equals, values = text.partition("=")
        name = name.removeprefix("--")
        if not equals or not name or not all(values.split(",")):
            raise ValueError(f"--set must be FLAG=VALUE,VALUE, got {text!r}")
        if name in settings:
            raise ValueError(f"--set names {name!r} twice")
        settings[name] = values.split(",")
    return Sweep(
        FLAGS.experiment,
        tuple(FLAGS.methods),
        tuple(run_flags.seeds(FLAGS.seeds)),
        settings,
        tuple(common),
    )


def from_file(path: str, common: Sequence[str]) -> Sweep:
    """The sweep that a JSON file describes, `common` flags added.

    Raises:
      ValueError: naming what is wrong in the file.
    """
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"--description: {path!r} is missing or no JSON object")
    content = {"set": {}, "flags": []} | content
    kinds = {"experiment": str, "methods": list, "seeds": list, "set": dict, "flags": list}
    for name in (*kinds, *content):
        if name not in kinds:
            raise ValueError(f"--description: unknown {name!r}; known: {', '.join(kinds)}")
        if not isinstance(content.get(name), kinds[name]):
            raise ValueError(f"--description: {name!r} must be a {kinds[name].__name__}")
    for name, values in content["set"].items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"--description: 'set' must give {name!r} a list of values")
    seeds = content["seeds"]
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"--description: 'seeds' must be whole numbers >= 0, got {seeds!r}")
    return Sweep(
        content["experiment"],
        tuple(content["methods"]),
        tuple(seeds),
        {name: [_flag_text(v) for v in values] for name, values in content["set"].items()},
        (*content["flags"], *common),
    )


def _flag_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def described(argv: Sequence[str]) -> Sweep:
    """The sweep of a command line: flags before `--` or a description, flags of the jobs after it.

    Raises:
      ValueError: naming the flag.
    """
    stray = [text for text in argv if not text.startswith("--")]
    if stray:
        raise ValueError(f"unexpected argument {stray[0]!r}; flags of the jobs go after --")
    if FLAGS.num_workers < 1:
        raise ValueError(f"--num_workers must be >= 1, got {FLAGS.num_workers}")
    if FLAGS.description is None:
        sweep = from_flags(argv)
    else:
        for name in ("experiment", "methods", "seeds", "set"):
            if FLAGS[name].present:
                raise ValueError(f"--{name} and --description say the same: give one")
        sweep = from_file(FLAGS.description, argv)
    for name in ("methods", "seeds"):
        values = getattr(sweep, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"--{name} must name different {name}, got {list(values)!r}")
    for name in ("methods", "seeds", "workdir"):
        if name in sweep.settings or any(f.startswith(f"--{name}=") for f in sweep.common):
            raise ValueError(f"--set: the sweep itself decides --{name} of its jobs")
    return sweep


def check_flags(planned: Sequence[jobs.Job]) -> None:
    """Parses the flags of all jobs as they will, in a process that has no flags yet.

    Raises:
      ValueError: naming the first flag that would be refused.
    """
    arguments = sorted({job.arguments for job in planned})
    asked = json.dumps({"experiment": planned[0].experiment, "arguments": arguments})
    checked = subprocess.run(
        [sys.executable, "-m", "experiments.jobs.run_job", "--check"],
        input=asked,
        capture_output=True,
        text=True,
        check=False,
    )
    if checked.returncode != 0:
        raise ValueError((checked.stderr.strip() or "no answer").splitlines()[-1])


def slurm_parameters(texts: Sequence[str], num_workers: int) -> dict[str, Any]:
    """Parameters of submitit's executor.

    Raises:
      ValueError: a text that is not NAME=VALUE.

    >>> slurm_parameters(["timeout_min=60", "slurm_partition=gpu"], 4)
    {'timeout_min': 60, 'slurm_partition': 'gpu', 'slurm_array_parallelism': 4}
    """
    parameters = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--slurm must be NAME=VALUE, got {text!r}")
        parameters[name] = int(value) if value.isdecimal() else value
    return parameters | {"slurm_array_parallelism": num_workers}


def executor(workdir: pathlib.Path):
    """Submitit's executor for `--cluster`.

    Raises:
      ValueError: submitit is not installed, or a parameter is not one of its.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError("--cluster needs submitit: pip install lpa_jax[slurm]") from None
    made = submitit.AutoExecutor(folder=workdir / "submitit", cluster=FLAGS.cluster)
    parameters = slurm_parameters(FLAGS.slurm, FLAGS.num_workers)
    try:
        made.update_parameters(**parameters)
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(f"--slurm: {str(error).splitlines()[0]}") from None
    return made


class _Progress:
    """A line on standard error for each job that ends."""

    def __init__(self, total: int, quiet: bool):
        self._total, self._ended, self._quiet = total, 0, quiet

    def __call__(self, outcome: jobs.Outcome) -> None:
        self._ended += 1
        if not self._quiet:
            detail = f": {outcome.detail}" if outcome.detail else ""
            line = f"[{self._ended}/{self._total}] {outcome.job.name}: {outcome.status}{detail}"
            print(line, file=sys.stderr, flush=True)


def run(planned: Sequence[jobs.Job], workdir: pathlib.Path) -> list[jobs.Outcome]:
    """Runs what is not done; the outcomes of all jobs."""
    done = [job for job in planned if jobs.is_done(job.folder)]
    todo = [job for job in planned if job not in done]
    progress = _Progress(len(todo), FLAGS.quiet)
    outcomes = [jobs.Outcome(job, jobs.SKIPPED) for job in done]
    if not todo:
        return outcomes
    if FLAGS.cluster == "none":
        return outcomes + jobs.run_here(todo, FLAGS.num_workers, FLAGS.gpus, progress)
    ended = cluster.SlurmQueue() if FLAGS.cluster == "slurm" else cluster.by_submitit
    return outcomes + cluster.run(todo, executor(workdir), ended, progress)


def summarize(outcomes: Sequence[jobs.Outcome]) -> str:
    """The line of counts, and before it a line for each job that failed."""
    failed = [outcome for outcome in outcomes if outcome.status == jobs.FAILED]
    lines = [f"failed: {outcome.job.name}: {outcome.detail}  ({outcome.job.folder}/{jobs.LOG})"
             for outcome in failed]  # fmt: skip
    counts = collections.Counter(outcome.status for outcome in outcomes)
    names = {jobs.SKIPPED: "done before", jobs.RUNNING: "running elsewhere"}
    texts = [f"{counts[status]} {names.get(status, status)}" for status in jobs.STATUSES
             if counts[status]]  # fmt: skip
    return "\n".join([*lines, f"{len(outcomes)} jobs: {', '.join(texts)}"])


def _terminate(number, frame):
    raise _TerminatedError


def main(argv: list[str]) -> None:
    """Entry point; exits with 1 if a job failed or was interrupted, with 130 or 143 if this was."""
    signal.signal(signal.SIGTERM, _terminate)
    workdir = pathlib.Path(FLAGS.workdir)
    try:
        sweep = described(argv[1:])
        planned = jobs.plan(workdir, *sweep)
        check_flags(planned)
        jobs.prepare(planned)
        outcomes = run(planned, workdir)
        try:
            report.make([workdir / "jobs"], workdir / "report", FLAGS.baseline, page=True)
            print(f"Report in {workdir / 'report'}")
        except ValueError as error:
            print(f"no report: {error}", file=sys.stderr)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print(
            "interrupted: what is done is kept, the same command goes on from there",
            file=sys.stderr,
        )
        number = signal.SIGTERM if isinstance(stop, _TerminatedError) else signal.SIGINT
        sys.exit(128 + number)
    print(summarize(outcomes))
    if any(outcome.status in (jobs.FAILED, jobs.STOPPED) for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    app.run(main)
