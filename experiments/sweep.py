r"""Methods x seeds x settings as jobs, on this machine or on a Slurm cluster.

    python -m experiments.sweep --experiment=long_tail --methods=erm,lpl,lpa --num_seeds=8 \
        --set imbalance=10,100 --set model=mlp,small_cnn --num_workers=2 -- --epochs=60

Each job is one run of the experiment and has its own log. Flags after `--` go to every job; `--set
flag=a,b` runs all combinations. A JSON file describes a sweep whose values hold commas:
`--description=sweep.json` with {"experiment": "long_tail", "methods": ["erm"], "seeds": [0, 1],
"set": {"milestones": ["0.3,0.6", "0.5"]}, "flags": ["--epochs=60"]}.

The same command resumes a sweep: it skips finished jobs, resumes interrupted and failed ones, and
leaves those that another process runs. Several sweeps may share a --workdir. WORKDIR/report holds
the report of all results. Slurm: `--cluster=slurm --slurm=slurm_partition=gpu
--slurm=gpus_per_node=1 --slurm=timeout_min=240` (parameters of submitit, extra `slurm`).
"""

import collections
import json
import pathlib
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from absl import flags

from experiments import report
from experiments.jobs import jobs, run_job, slurm
from experiments.methods import names as methods
from experiments.runtime import console, fields, files, schema
from experiments.runtime import main as entry_point
from experiments.training import flags as run_flags
from lpa_jax import checks
from lpa_jax.training import interrupts

FLAGS = flags.FLAGS
HINT = "; flags of the jobs go after --, as in: sweep --num_seeds=8 -- --dataset=cifar10"
_DESCRIPTION = {
    "experiment": schema.TEXT,
    "methods": [schema.TEXT],
    "seeds": [schema.WHOLE, ...],
    "set?": {...: [schema.ANY, ...]},
    "flags?": [schema.TEXT],
}
CLUSTERS = ("none", "slurm", "local", "debug")


class Sweep(NamedTuple):
    """What to run; `common` are flags of every job, `settings` those whose values vary."""

    experiment: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Sequence[str]]
    common: tuple[str, ...]


def define_flags() -> None:
    flags.DEFINE_string("experiment", "long_tail", "Experiment that jobs run.")
    flags.DEFINE_list("methods", ["erm", "lpl", "lpa", "lpa+lpl"], "Methods to run.")
    run_flags.define_seeds(8)
    flags.DEFINE_multi_string("set", [], "FLAG=VALUE,VALUE: a flag of the jobs and its values.")
    files.define_path("description", None, "JSON file in place of the four flags above.")
    files.define_path("workdir", "runs/sweep", "Folder of the jobs and their report.", folder=True)
    flags.DEFINE_integer("num_workers", 1, "Most jobs at once.")
    flags.DEFINE_list("gpus", [], "Devices that workers take in turn, such as 0,1; empty: all.")
    flags.DEFINE_enum(
        "cluster", "none", CLUSTERS, "none: processes here; else submitit's executor of that name."
    )
    flags.DEFINE_multi_string("slurm", [], "NAME=VALUE: a parameter of submitit's executor.")
    flags.DEFINE_string("baseline", "erm", "Baseline of the report.")
    flags.DEFINE_bool("quiet", False, "Print the report and the counts, but no line per job.")


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
            raise ValueError(f"--set must name a flag once, got {name!r} twice")
        settings[name] = values.split(",")
    seeds = tuple(run_flags.seeds())
    return Sweep(FLAGS.experiment, tuple(FLAGS.methods), seeds, settings, tuple(common))


def from_file(path: str, common: Sequence[str]) -> Sweep:
    """The sweep that a JSON file describes, with `common` flags added.

    Raises:
      ValueError: naming the key of the file that is wrong.
    """
    content = fields.named("description", lambda: schema.read(pathlib.Path(path), _DESCRIPTION))
    if content is None:
        raise ValueError(f"--description must name a file with a JSON object, got {path!r}")
    content, seeds = {"set": {}, "flags": []} | content, content["seeds"]
    fields.named("description", lambda: run_flags.numbers([f"{seed}-{seed}" for seed in seeds]))
    return Sweep(
        content["experiment"],
        tuple(content["methods"]),
        tuple(seeds),
        {
            name: [value if isinstance(value, str) else json.dumps(value) for value in values]
            for name, values in content["set"].items()
        },
        (*content["flags"], *common),
    )


def described(argv: Sequence[str]) -> Sweep:
    """The sweep of a command line; `argv` holds the flags of the jobs.

    Raises:
      ValueError: naming the flag.
    """
    stray = [text for text in argv if not text.startswith("--")]
    if stray:
        raise ValueError(f"unexpected argument {stray[0]!r}; flags of the jobs go after --")
    checks.integer("--num_workers", FLAGS.num_workers, 1, 10**4)
    if FLAGS.description is None:
        sweep = from_flags(argv)
    else:
        for name in ("experiment", "methods", "num_seeds", "seeds", "set"):
            if FLAGS[name].present:
                raise ValueError(f"--{name} and --description say the same: give one")
        sweep = from_file(FLAGS.description, argv)
    sweep = sweep._replace(common=tuple(entry_point.with_flagfiles(sweep.common)))
    if FLAGS.baseline != methods.ERM:
        fields.named("baseline", lambda: methods.parse(FLAGS.baseline))
    for name in ("methods", "seeds"):
        values = getattr(sweep, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"--{name} must name different {name}, got {list(values)!r}")
    for name in ("methods", "num_seeds", "seeds", "workdir"):
        if name in sweep.settings or any(f.startswith(f"--{name}=") for f in sweep.common):
            raise ValueError(f"the sweep itself decides --{name} of its jobs")
    return sweep


def run(planned: Sequence[jobs.Job], executor=None) -> list[jobs.Outcome]:
    """Runs the jobs that are not done, here or by submitit's executor; the outcomes of all."""
    done = [job for job in planned if jobs.is_done(job.folder)]
    todo = [job for job in planned if job not in done]
    ended = 0

    def progress(outcome):
        nonlocal ended
        ended += 1
        if not FLAGS.quiet:
            detail = f": {outcome.detail}" if outcome.detail else ""
            line = f"[{ended}/{len(todo)}] {outcome.job.name}: {outcome.status}{detail}"
            print(line, file=sys.stderr, flush=True)

    outcomes = [jobs.Outcome(job, jobs.SKIPPED) for job in done]
    if executor is None:
        return outcomes + jobs.run_here(todo, FLAGS.num_workers, FLAGS.gpus, progress)
    outcome_of = slurm.SlurmQueue() if FLAGS.cluster == "slurm" else slurm.by_submitit
    return outcomes + (slurm.run(todo, executor, outcome_of, progress) if todo else [])


def summarize(outcomes: Sequence[jobs.Outcome]) -> str:
    """A line for each failed job, then the number of jobs by status."""
    lines = [
        f"failed: {job.name}: {detail}  ({job.folder}/{jobs.LOG})"
        for job, status, detail in outcomes
        if status == jobs.FAILED
    ]
    counts = collections.Counter(outcome.status for outcome in outcomes)
    names = {jobs.SKIPPED: "done before", jobs.RUNNING: "running elsewhere"}
    texts = [f"{counts[s]} {names.get(s, s)}" for s in jobs.STATUSES if counts[s]]
    return "\n".join([*lines, f"{len(outcomes)} jobs: {', '.join(texts)}"])


def _end(number, frame):
    console.stop_waiting()
    raise KeyboardInterrupt(number)


def main(argv: list[str]) -> None:
    """Entry point; exits with 1 if a job failed or was interrupted, as `Interrupts` if this was."""
    for number in interrupts.SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    workdir = pathlib.Path(FLAGS.workdir)
    try:
        sweep = described(argv[1:])
        planned = jobs.plan(workdir, *sweep)
        run_job.check_in_new_process(sweep.experiment, sorted({job.arguments for job in planned}))
        executor = None
        if FLAGS.cluster != "none":
            chosen = slurm.parameters(FLAGS.slurm, FLAGS.num_workers)
            executor = slurm.executor(workdir / "submitit", FLAGS.cluster, **chosen)
        jobs.prepare(planned)
        outcomes = run(planned, executor)
        try:
            report.make([workdir / "jobs"], workdir / "report", FLAGS.baseline, page=True)
            print(f"Report in {workdir / 'report'}")
        except ValueError as error:
            print(f"no report: {error}", file=sys.stderr)
    except (ValueError, OSError) as error:
        sys.exit(entry_point.refusal(error))
    except KeyboardInterrupt as stop:
        print("interrupted: finished jobs are kept, the same command resumes it", file=sys.stderr)
        sys.exit(128 + (stop.args or (signal.SIGINT,))[0])
    print(summarize(outcomes))
    if any(outcome.status in (jobs.FAILED, jobs.STOPPED) for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    entry_point.start(define_flags, main, HINT)
