r"""Tunes hyperparameters for domain generalization by training-domain validation.

    python -m experiments.domain_tune --schedule=cosine --learning_rate_range=1e-3,2e-2 \
        --output=experiments/hparams/domain_generalization_RotatedMNIST_small_cnn.json

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

from absl import app, flags

from experiments import (
    domain_flags,
    domain_selection,
    entry_point,
    files,
    methods,
    run_flags,
    search,
)
from experiments.domain_protocol import Network, Trainings
from experiments.domain_settings import DomainSettings, DomainSource
from experiments.progress import RunProgress
from lpa_jax import multihost
from lpa_jax.interrupts import Interrupts

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this module."""
    domain_flags.define_flags("runs/domain_tune")
    flags.DEFINE_integer("trials", 12, "Trials of every method.")
    flags.DEFINE_integer("num_seeds", 1, "Seeds that every trial is averaged over.")
    flags.DEFINE_integer("first_seed", 100, "The first of them; keep test seeds out.")
    flags.DEFINE_integer("search_seed", 0, "Seed of the random search.")
    flags.DEFINE_string("output", "", "File for the chosen hyperparameters; not written if empty.")
    flags.DEFINE_integer("worker", 0, "Which share of the trials this process runs.")
    flags.DEFINE_integer("num_workers", 1, "Processes that share the trials.")
    flags.adopt_module_key_flags(domain_flags)
    flags.adopt_module_key_flags(run_flags)


class Trial(NamedTuple):
    """A network of a trial: one of its seeds and test domains.

    Attributes:
      number: of the trial, which says what is drawn.
      network: what is trained.
    """

    number: int
    network: Network


def seeds() -> range:
    """Seeds that every trial is averaged over.

    Raises:
      ValueError: a flag is out of range.
    """
    for name, low in (("num_seeds", 1), ("first_seed", 0)):
        if FLAGS[name].value < low:
            raise ValueError(f"--{name} must be >= {low}, got {FLAGS[name].value}")
    return range(FLAGS.first_seed, FLAGS.first_seed + FLAGS.num_seeds)


def trial_options(settings: DomainSettings, method: str, trial: int) -> dict[str, Any]:
    """What a trial draws, and what flags fix for all."""
    hidden = run_flags.searched_layers(settings.model)
    drawn = search.draw(method, trial, hidden, FLAGS.search_seed, domain_flags.search_ranges())
    explicit = domain_flags.explicit_options()
    return methods.options_for(method, drawn, explicit) | run_flags.explicit_run_options()


def best(scores: Mapping[int, float | None]) -> int | None:
    """The first of the trials with the highest score; None if all diverged.

    >>> best({0: None, 1: 0.5, 2: 0.7, 3: 0.7})
    2
    """
    scored = {trial: score for trial, score in scores.items() if score is not None}
    return max(scored, key=scored.__getitem__, default=None)


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
        chosen = best({trial: scores[trial, domain] for trial in trials})
        if chosen is None:
            return None
        by_domain[domain] = {
            "options": trials[chosen],
            "trial": chosen,
            "validation_accuracy": scores[chosen, domain],
        }
    average = {trial: _mean([scores[trial, domain] for domain in domains]) for trial in trials}
    pooled = best(average)
    if pooled is None:
        return None
    return {
        "chosen": trials[pooled],
        "trial": pooled,
        "validation_accuracy": average[pooled],
        "all_scores": sorted((s for s in average.values() if s is not None), reverse=True),
        "diverged": sum(score is None for score in average.values()),
        "by_test_domain": by_domain,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)


def score(records: Sequence[domain_selection.Record], test: str) -> float | None:
    """Validation accuracy at the best checkpoint; None if the network diverged."""
    return max((domain_selection.holdout_accuracy(r, [test]) for r in records), default=None)


def tune(interrupts: Interrupts) -> None:
    """Runs this worker's missing trials; writes the choice when no trial is missing."""
    settings = domain_flags.settings()
    run_flags.apply_runtime_flags()
    if FLAGS.trials < 1:
        raise ValueError(f"--trials must be >= 1, got {FLAGS.trials}")
    if not 0 <= FLAGS.worker < FLAGS.num_workers:
        raise ValueError(
            f"--worker must lie in 0..{FLAGS.num_workers - 1} (--num_workers - 1), "
            f"got {FLAGS.worker}"
        )
    source = DomainSource(settings)
    trials = [
        Trial(number, Network(method, trial_options(settings, method, number), (test,), seed))
        for seed in seeds()
        for method in FLAGS.methods
        for number in range(FLAGS.trials)
        for test in domain_flags.domains_to_test(source.names)
    ]
    trainings = Trainings(
        settings,
        source,
        pathlib.Path(FLAGS.workdir) / "trainings",
        FLAGS.layer,
        look_at_held_out=False,
        saving=run_flags.saving(),
        should_stop=interrupts,
    )
    todo = []
    for trial in trials:
        trainings.program(trial.network).check(trial.network.options)
        mine = trial.number % FLAGS.num_workers == FLAGS.worker
        if trainings.finished(trial.network) is None and mine:
            todo.append(trial.network)
    quiet = FLAGS.quiet or not multihost.is_first_host()
    with interrupts, RunProgress(len(todo), settings.intervals, quiet) as progress:
        for network in todo:
            trainings.run(network, progress, may_diverge=True)
    if not multihost.is_first_host():
        return
    found = [trainings.finished(trial.network) for trial in trials]
    if None in found:
        print("Trials of other workers are missing; run any worker again when they are done.")
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
        print(f"{method}: {100 * entry['validation_accuracy']:.2f} %  {entry['chosen']}")
        for test, of_domain in entry["by_test_domain"].items():
            accuracy = 100 * of_domain["validation_accuracy"]
            print(f"  without {test}: {accuracy:.2f} %  trial {of_domain['trial']}")
    if not FLAGS.output:
        return
    searched = {
        "settings": settings.as_dict(),
        "seeds": list(seeds()),
        "search_seed": FLAGS.search_seed,
        "trials": FLAGS.trials,
    }
    files.write_json(FLAGS.output, {"search": searched, "methods": chosen})
    print(f"Written to {FLAGS.output}")


def main(argv: list[str]) -> None:
    """Entry point."""
    entry_point.run(argv, tune)


if __name__ == "__main__":
    define_flags()
    app.run(main)
