r"""Tunes hyperparameters for domain generalization by training-domain validation.

    python -m experiments.domain_tune --schedule=cosine --learning_rate_range=1e-3,2e-2 \
        --output=experiments/methods/hparams/domain_generalization_RotatedMNIST_small_cnn.json

Random search (ranges: `experiments.search`), the same number of trials for every method: each trial
trains without every test domain in turn, with every seed. What counts is the accuracy on the
holdouts of the training domains, at the best checkpoint; the held-out domain is never opened. For
each test domain the trial is chosen that was best without it, so that its images have no part in
the choice; for domains that are not tuned with, the best on average, which may have seen them.
Finished trials are kept in `--workdir` and skipped when the command is given again; several workers
share the work with --worker=0..n-1 --num_workers=n.
"""

import functools
import pathlib
from typing import Any

from absl import flags

from experiments.domains import flags as domain_flags
from experiments.domains.data import DomainSource
from experiments.domains.networks import Training, Trainings
from experiments.domains.selection import best_validation
from experiments.domains.settings import DomainSettings
from experiments.methods import flags as method_flags
from experiments.methods import names, search
from experiments.runtime import hosts
from experiments.runtime import main as entry_point
from experiments.runtime.progress import RunProgress
from experiments.training import flags as run_flags
from experiments.training import search_loop
from experiments.training.search_loop import Trial
from lpa_jax import multihost
from lpa_jax.training.interrupts import Interrupts

FLAGS = flags.FLAGS


def define_flags() -> None:
    domain_flags.define_flags("runs/domain_tune")
    search_loop.define_flags(trials=12, seeds="100-100")


def plan(trainings: Trainings, settings: DomainSettings, domains: tuple[str, ...]) -> list[Trial]:
    """All trials: every draw of options, without every test domain, with every seed.

    Raises:
      ValueError: a flag or option that does not fit.
    """
    names.check_different(FLAGS.methods)
    method_flags.check_reach(FLAGS.methods)
    hidden, ranges = method_flags.searched_layers(settings.model), domain_flags.search_ranges()
    trials = []
    for seed in run_flags.seeds():
        for method in FLAGS.methods:
            for number in range(FLAGS.trials):
                drawn = search.draw(method, number, hidden, FLAGS.search_seed, ranges)
                options = domain_flags.options_for(method, drawn, settings.train_steps)
                for test in domain_flags.domains_to_test(domains):
                    training = Training(method, options, (test,), seed)
                    trainings.program(training)  # raises for options that do not fit
                    place = trainings.place(training)
                    find = functools.partial(outcome, trainings, training)
                    train = functools.partial(trainings.run, training)
                    trials.append(Trial(method, number, test, place, find, train))
    return trials


def outcome(trainings: Trainings, training: Training) -> dict[str, Any] | None:
    """The options and the score of a finished training; None if it is missing."""
    found = trainings.finished(training)
    if found is None:
        return None
    score = best_validation(found["records"], training.held_out)
    return {"options": training.options, "score": score}


def tune(interrupts: Interrupts) -> None:
    """Trains this worker's missing trials; writes the choice if no trial is missing."""
    settings = domain_flags.settings()
    search_loop.check_flags()
    workdir, first = pathlib.Path(FLAGS.workdir), multihost.is_first_host()
    source = DomainSource(settings)
    trainings = Trainings(
        settings,
        source,
        workdir / "trainings",
        FLAGS.layer,
        look_at_held_out=False,
        saving=run_flags.saving(),
        should_stop=interrupts,
    )
    trials = plan(trainings, settings, source.names)
    todo = search_loop.missing(trials)
    places = [trial.lock.relative_to(workdir).as_posix() for trial in todo]
    hosts.check(workdir, places, hosts.UNFINISHED)
    progress = RunProgress(len(todo), settings.intervals, FLAGS.quiet or not first, unit="interval")
    search_loop.run(workdir, todo, progress, interrupts)
    if first:
        seeds = run_flags.seeds()
        searched = {"settings": settings.as_dict(), "seeds": seeds}
        search_loop.finish(trials, searched | {"search_seed": FLAGS.search_seed})


def main(argv: list[str]) -> None:
    entry_point.run(argv, tune)


if __name__ == "__main__":
    entry_point.start(define_flags, main)
