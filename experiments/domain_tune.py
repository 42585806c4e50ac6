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

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments.domains import flags as domain_flags
from experiments.domains import selection as domain_selection
from experiments.domains.networks import Network, Trainings
from experiments.domains.settings import DomainSettings, DomainSource
from experiments.methods import flags as method_flags
from experiments.methods import search
from experiments.runtime import files, hosts
from experiments.runtime import main as entry_point
from experiments.runtime.progress import RunProgress
from experiments.training import flags as run_flags
from experiments.training import search_loop
from lpa_jax import multihost
from lpa_jax.interrupts import Interrupts

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this module."""
    domain_flags.define_flags("runs/domain_tune")
    search_loop.define_flags(trials=12, seeds="100-100")


class Trial(NamedTuple):
    """A network of a trial: one of its seeds and test domains.

    Attributes:
      number: of the trial, which says what is drawn.
      network: what is trained.
    """

    number: int
    network: Network


def trial_options(settings: DomainSettings, method: str, trial: int) -> dict[str, Any]:
    """What a trial draws, and what flags fix for all."""
    hidden = method_flags.searched_layers(settings.model)
    drawn = search.draw(method, trial, hidden, FLAGS.search_seed, domain_flags.search_ranges())
    return domain_flags.options_for(method, drawn, settings.train_steps)


def choose(
    scores: Mapping[tuple[int, str], float | None], trials: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """A method's hyperparameters for every test domain, and on average; None if all diverged.

    Args:
      scores: validation accuracy by trial and test domain; None if a network diverged.
      trials: options by trial.
    """
    domains = dict.fromkeys(domain for _, domain in scores)
    by_domain = {}
    for domain in domains:
        chosen = search_loop.best({trial: scores[trial, domain] for trial in trials})
        if chosen is None:
            return None
        by_domain[domain] = {
            "options": trials[chosen],
            "trial": chosen,
            "validation_accuracy": scores[chosen, domain],
        }
    average = {trial: _mean([scores[trial, domain] for domain in domains]) for trial in trials}
    pooled = search_loop.choice(average, trials)
    return None if pooled is None else pooled | {"by_test_domain": by_domain}


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)


def score(records: Sequence[domain_selection.Record], test: str) -> float | None:
    """Validation accuracy at the best checkpoint; None if the network diverged."""
    return max((domain_selection.holdout_accuracy(r, [test]) for r in records), default=None)


def tune(interrupts: Interrupts) -> None:
    """Runs this worker's missing trials; writes the choice when no trial is missing."""
    settings = domain_flags.settings()
    run_flags.apply_runtime_flags()
    search_loop.check_flags()
    workdir = pathlib.Path(FLAGS.workdir)
    source = DomainSource(settings)
    trials = [
        Trial(number, Network(method, trial_options(settings, method, number), (test,), seed))
        for seed in run_flags.seeds(FLAGS.seeds)
        for method in FLAGS.methods
        for number in range(FLAGS.trials)
        for test in domain_flags.domains_to_test(source.names)
    ]
    trainings = Trainings(
        settings,
        source,
        workdir / "trainings",
        FLAGS.layer,
        look_at_held_out=False,
        saving=run_flags.saving(),
        should_stop=interrupts,
    )
    todo = []
    for trial in trials:
        trainings.program(trial.network).check(trial.network.options)
        if trainings.finished(trial.network) is None and search_loop.is_mine(trial.number):
            todo.append(trial.network)
    planned = files.plain([network._asdict() for network in todo])
    hosts.check(workdir, planned, hosts.UNFINISHED)
    quiet = FLAGS.quiet or not multihost.is_first_host()
    progress = RunProgress(len(todo), settings.intervals, quiet)
    with search_loop.held(workdir, search_loop.share(workdir)), interrupts, progress:
        for network in todo:
            with search_loop.held(workdir, trainings.place(network)):
                trainings.run(network, progress, may_diverge=True)
    if not multihost.is_first_host():
        return
    found = [trainings.finished(trial.network) for trial in trials]
    if None in found:
        search_loop.say_incomplete()
        return
    chosen = choose_all(trials, [training["records"] for training in found])
    report(settings, chosen)


def choose_all(
    trials: Sequence[Trial], records: Sequence[Sequence[domain_selection.Record]]
) -> dict[str, dict[str, Any]]:
    """Every method's hyperparameters; scores are means over seeds.

    Raises:
      ValueError: every trial of a method diverged.
    """
    by_seed: dict[str, dict[tuple[int, str], list[float | None]]] = {}
    options: dict[str, dict[int, Mapping[str, Any]]] = {}
    for (number, network), of_network in zip(trials, records, strict=True):
        (test,) = network.held_out
        scores = by_seed.setdefault(network.method, {}).setdefault((number, test), [])
        scores.append(score(of_network, test))
        options.setdefault(network.method, {})[number] = network.options
    chosen = {}
    for method, scores in by_seed.items():
        means = {key: _mean(of_seeds) for key, of_seeds in scores.items()}
        chosen[method] = choose(means, options[method])
        if chosen[method] is None:
            raise ValueError(f"--methods: every trial of {method} diverged for some test domain")
    return chosen


def report(settings: DomainSettings, chosen: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints what was chosen and writes it."""
    for method, entry in chosen.items():
        search_loop.say_choice(method, entry)
        for test, of_domain in entry["by_test_domain"].items():
            accuracy = 100 * of_domain["validation_accuracy"]
            print(f"  without {test}: {accuracy:.2f} %  trial {of_domain['trial']}")
    searched = {
        "settings": settings.as_dict(),
        "seeds": run_flags.seeds(FLAGS.seeds),
        "search_seed": FLAGS.search_seed,
    }
    search_loop.write(searched, chosen)


def main(argv: list[str]) -> None:
    """Entry point."""
    entry_point.run(argv, tune)


if __name__ == "__main__":
    entry_point.start(define_flags, main)
