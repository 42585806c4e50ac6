"""Commands as documents write them, checked without running them."""

import contextlib
import importlib
import re
import shlex

from absl import flags

from experiments import sweep
from experiments.jobs import jobs
from experiments.jobs import run_job as job_run

FLAGS = flags.FLAGS
# Modules that no sweep runs: they take names after their flags, or methods in a form of their own.
NOT_JOBS = ("benchmark", "compile_check", "report")


@contextlib.contextmanager
def parsed(module, arguments):
    """The arguments that are no flags of the module, whose flags are in force within the block."""
    before = set(FLAGS)
    module.define_flags()
    try:
        yield FLAGS([module.__name__, *arguments])[1:]
    finally:
        for name in set(FLAGS) - before:
            delattr(FLAGS, name)
        FLAGS.unparse_flags()


def jobs_of(arguments, workdir):
    """The jobs that a command of `experiments.sweep` would run."""
    with parsed(sweep, arguments) as rest:
        return jobs.plan(workdir, *sweep.described(rest))


def check(command, workdir):
    """Parses `python -m experiments.NAME ...`: module, flags, values and methods must exist.

    Args:
      command: one line; settings of the environment may stand before it, a comment after it.
      workdir: a folder that need not exist, where a sweep would plan its jobs.
    """
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    python, minus_m, module, *arguments = words
    package, experiment = module.split(".")
    assert (python, minus_m, package) == ("python", "-m", "experiments")
    if experiment == "sweep":
        planned = jobs_of(arguments, workdir)
        job_run.check(planned[0].experiment, sorted({job.arguments for job in planned}))
    elif experiment in NOT_JOBS:
        with parsed(importlib.import_module(module), arguments):
            pass
    else:
        with job_run.parsed(experiment, arguments):
            pass
