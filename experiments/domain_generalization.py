r"""Domain generalization: does a network recognise classes in a domain that it never saw?

    python -m experiments.domain_generalization

trains ERM, CORAL, LPA and CORAL+LPA by DomainBed's protocol on RotatedMNIST, made of 5000 images:
each of the six domains is held out in turn, 80% of every other domain is trained on, with 3 paired
seeds: about 10 minutes on a CPU core. Three model selections are reported side by side:

- training-domain validation: the mean accuracy on the 20% of each training domain held back;
- leave-one-domain-out (with --leave_two_out, which trains a network for every pair of domains): the
  mean accuracy on training domains that were left out as well;
- oracle: the test domain's own 20%, after the last step. It looks at the test domain.

With --draws=1 hyperparameters are fixed (`experiments.domain_tune` finds them) and only checkpoints
are selected; with --draws=20 each method draws as many sets of hyperparameters, anew for each seed,
and selection chooses among them, as in the publication. On an accelerator, DomainBed's own scale:

    python -m experiments.domain_generalization --dataset=PACS --data_dir=DIR --model=resnet50 \
        --layer=stage4 --train_steps=5000 --batch_size=32 --evaluate_every=250 --draws=20 \
        --augmentation=file_crop+flip+jitter+grayscale --pretrained=resnet50.safetensors \
        --freeze_batch_norm --leave_two_out --space=batch_size=8:45.25 \
        --space="model_dropout=0|0.1|0.5"

Its published figures start from torchvision's ImageNet weights; docs/datasets.md says how to bring
them and what still differs.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments.domains import flags as domain_flags
from experiments.domains import selection as domain_selection
from experiments.domains.networks import Network, Trainings
from experiments.domains.selection import Selected, Training
from experiments.domains.settings import DomainSettings, DomainSource
from experiments.methods import flags as method_flags
from experiments.methods import names as methods
from experiments.methods import search
from experiments.methods import tuned as tuned_file
from experiments.reporting import tables
from experiments.runtime import files, hosts
from experiments.runtime import main as entry_point
from experiments.runtime.progress import RunProgress
from experiments.training import flags as run_flags
from experiments.training import folder as run_folder
from lpa_jax import multihost
from lpa_jax.files import refuse_if_held
from lpa_jax.interrupts import Interrupts
from lpa_jax.training import loop as trainer

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of this module."""
    domain_flags.define_flags("runs/domain_generalization")
    flags.DEFINE_list("seeds", ["3"], f"{run_flags.SEEDS}; paired over methods.")
    flags.DEFINE_integer("draws", 1, "Sets of hyperparameters of each method; 1: fixed ones.")
    flags.DEFINE_bool(
        "leave_two_out", False, "Also train without each pair of domains, for cross-validation."
    )
    flags.DEFINE_string(
        "hparams",
        "auto",
        "File of tuned hyperparameters from experiments.domain_tune; auto takes the one that comes "
        "with the project for this data set and model, none takes the methods' defaults.",
    )


class Run(NamedTuple):
    """What is reported for a method, a seed and a test domain.

    Attributes:
      method: its name.
      seed: of the run.
      test: the test domain.
      draws: options, one set a draw.
    """

    method: str
    seed: int
    test: str
    draws: tuple[Mapping[str, Any], ...]

    def folder(self, workdir: pathlib.Path) -> pathlib.Path:
        """Where its result stands."""
        return workdir / "runs" / self.method / f"test_{self.test}" / f"seed_{self.seed}"


def tuned_hparams(settings: DomainSettings) -> tuned_file.Tuned:
    """What --hparams names.

    Raises:
      ValueError: no such file, or not one of `experiments.domain_tune`.
    """
    if FLAGS.draws > 1:
        return tuned_file.Tuned("drawn")
    return tuned_file.find(
        FLAGS.hparams, "domain_generalization", settings, methods.DOMAIN_RUN_OPTIONS
    )


def plan(settings: DomainSettings, tests: Sequence[str], tuned: tuned_file.Tuned) -> list[Run]:
    """All runs; seeds outermost, so that an interrupted job leaves complete pairs.

    Raises:
      ValueError: naming the flag that does not fit.
    """
    if FLAGS.draws < 1:
        raise ValueError(f"--draws must be >= 1, got {FLAGS.draws}")
    if FLAGS.draws > 1 and FLAGS.hparams not in ("auto", "none"):
        raise ValueError(f"--draws={FLAGS.draws} draws hyperparameters: --hparams must be none")
    methods.check_different(FLAGS.methods)
    hidden = method_flags.searched_layers(settings.model)
    ranges = domain_flags.search_ranges()

    def options(method, seed, test, draw):
        found = tuned.options(method, test)
        if FLAGS.draws > 1:
            found = search.draw(method, draw, hidden, seed, ranges)
        return domain_flags.options_for(method, found, settings.train_steps)

    return [
        Run(method, seed, test, tuple(options(method, seed, test, d) for d in range(FLAGS.draws)))
        for seed in run_flags.seeds(FLAGS.seeds)
        for method in FLAGS.methods
        for test in tests
    ]


def networks(run: Run, draw: int, domains: Sequence[str]) -> Iterator[Network]:
    """The networks of a run's draw: without the test domain, and without each pair with it."""
    options = run.draws[draw]
    yield Network(run.method, options, (run.test,), run.seed)
    for other in domains if FLAGS.leave_two_out else ():
        if other != run.test:
            # In the set's order: both domains of a pair share the network.
            pair = tuple(domain for domain in domains if domain in (run.test, other))
            yield Network(run.method, options, pair, run.seed)


def configuration(run: Run, settings: DomainSettings) -> dict[str, Any]:
    """Everything that decides a run's result, as plain values."""
    config = {
        "method": run.method,
        "seed": run.seed,
        "test_domain": run.test,
        "options": run.draws[0] if len(run.draws) == 1 else {},
        "settings": settings.as_dict() | {"draws": len(run.draws)},
    }
    if len(run.draws) > 1:
        config["drawn_options"] = list(run.draws)
    return files.plain(config)


def earlier_result(run: Run, config: Mapping[str, Any], workdir: pathlib.Path) -> Any | None:
    """A complete result that has the cross-validation, if that is asked for.

    A file that is there and cannot be read gets a line.

    Raises:
      ValueError: the folder holds another run.
    """
    result = run_folder.finished_result(run.folder(workdir), config, say=run_flags.say)
    wanted = domain_selection.LEAVE_ONE_DOMAIN_OUT
    if result is not None and FLAGS.leave_two_out and result["selections"].get(wanted) is None:
        return None
    return result


def train_all(
    settings: DomainSettings,
    source: DomainSource,
    runs: Sequence[Run],
    workdir: pathlib.Path,
    interrupts: Interrupts,
) -> list[dict[str, Any]]:
    """Trains what is missing and selects; returns the results in the order of the runs."""
    first = multihost.is_first_host()
    if first:
        refuse_if_held(workdir)
    trainings = Trainings(
        settings,
        source,
        workdir / "trainings",
        FLAGS.layer,
        saving=run_flags.saving(),
        should_stop=interrupts,
    )
    configs = {id(run): configuration(run, settings) for run in runs}
    found = {id(run): earlier_result(run, configs[id(run)], workdir) for run in runs}
    missing = [run for run in runs if found[id(run)] is None]
    hosts.check(workdir, [configs[id(run)] for run in missing], hosts.UNFINISHED)
    todo = _check_all(trainings, missing, source.names)
    progress = RunProgress(todo, settings.intervals, FLAGS.quiet or not first)
    with run_folder.held(workdir), interrupts, progress:
        for place in (workdir / "trainings", *(run.folder(workdir) for run in missing)):
            run_folder.check_inside(workdir, place)
        files.write_json(workdir / "flags.json", run_flags.resolved())
        for group in _groups(missing):
            for run in group:
                files.write_json(run.folder(workdir) / run_folder.CONFIG, configs[id(run)])
            trained = {id(run): [] for run in group}
            for draw in range(FLAGS.draws):
                for run in group:
                    for network in networks(run, draw, source.names):
                        outcome = trainings.run(network, progress, may_diverge=FLAGS.draws > 1)
                        training = Training(frozenset(network.held_out), draw, outcome["records"])
                        trained[id(run)].append((training, outcome["seconds"]))
            for run in group:
                result = files.plain(select(run, trained[id(run)], source.names))
                files.write_json(run.folder(workdir) / run_folder.RESULT, result)
                found[id(run)] = result
    return [found[id(run)] for run in runs]


def _check_all(trainings: Trainings, runs: Sequence[Run], domains: Sequence[str]) -> int:
    """Number of networks to train.

    Raises:
      ValueError: one cannot be trained as asked, or its folder holds another: nothing is written.
    """
    places = set()
    for run in runs:
        for draw in range(len(run.draws)):
            for network in networks(run, draw, domains):
                if trainings.finished(network) is None:
                    places.add(trainings.place(network))
                trainings.program(network).check(network.options)
    return len(places)


def _groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of one method and seed: draws go around all of their test domains."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, run.seed), []).append(run)
    return list(groups.values())


def select(
    run: Run, trained: Sequence[tuple[Training, float]], domains: Sequence[str]
) -> dict[str, Any]:
    """The result of a run from all its networks.

    Raises:
      trainer.NonFiniteLossError: every draw diverged.
    """
    trainings = [training for training, _ in trained]
    selected = domain_selection.select(trainings, run.test, domains)
    chosen = selected[domain_selection.TRAINING_DOMAIN_VALIDATION]
    if chosen is None:
        raise trainer.NonFiniteLossError(
            f"every draw of {run.method} diverged without domain {run.test}, seed {run.seed}"
        )
    testing = {t.draw: t for t in trainings if t.held_out == {run.test}}

    def described(choice: Selected):
        return choice._asdict() | {"options": run.draws[choice.draw]}

    known = {name: choice for name, choice in selected.items() if choice is not None}
    return {
        "complete": True,
        "method": run.method,
        "seed": run.seed,
        "test_domain": run.test,
        "options": run.draws[chosen.draw],
        "accuracy": chosen.accuracy,
        "selections": {
            name: None if choice is None else choice.accuracy for name, choice in selected.items()
        },
        "selected": {name: described(choice) for name, choice in known.items()},
        "draws": len(run.draws),
        "diverged": sum(not training.records for training in testing.values()),
        "records": testing[chosen.draw].records,
        "seconds": sum(seconds for training, seconds in trained if len(training.held_out) == 1),
    }


def _notes(tuned: tuned_file.Tuned, tests: Sequence[str], domains: Sequence[str]) -> list[str]:
    """What limits the comparison."""
    notes = []
    trained_on = [
        test for test in tests
        if any(m in tuned.pooled and test not in tuned.by_domain.get(m, {}) for m in FLAGS.methods)
    ]  # fmt: skip
    if trained_on:
        notes.append(
            "Hyperparameters for these test domains were tuned on networks that trained on them, "
            f"by validation images of theirs, too: {', '.join(trained_on)}."
        )
    if len(tests) < len(domains):
        notes.append(f"Test domains are {len(tests)} of {len(domains)}.")
    return notes


def compare(interrupts: Interrupts) -> None:
    """Does what the flags say."""
    settings = domain_flags.settings()
    run_flags.apply_runtime_flags()
    tuned = tuned_hparams(settings)
    source = DomainSource(settings)
    tests = domain_flags.domains_to_test(source.names)
    runs = plan(settings, tests, tuned)
    run_flags.say(f"Hyperparameters: {tuned.origin}")
    doubts = tuned_file.notes(tuned, FLAGS.methods, settings)
    if doubts:
        run_flags.say(" ".join(doubts))
    workdir = pathlib.Path(FLAGS.workdir)
    results = train_all(settings, source, runs, workdir, interrupts)
    title = f"{settings.dataset}, {settings.model}, accuracy on test domains"
    if multihost.is_first_host():
        limits = [*doubts, *_notes(tuned, tests, source.names)]
        by_method: dict[str, list[Mapping[str, Any]]] = {}
        for result in results:
            by_method.setdefault(result["method"], []).append(result)
        tables.write_comparison(title, by_method, workdir, limits)


def main(argv: list[str]) -> None:
    """Entry point."""
    entry_point.run(argv, compare)


if __name__ == "__main__":
    entry_point.start(define_flags, main)
