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
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments.domains import flags as domain_flags
from experiments.domains import selection
from experiments.domains.data import DomainSource
from experiments.domains.networks import Trainings
from experiments.domains.runs import Run, train_all
from experiments.domains.settings import DomainSettings
from experiments.methods import flags as method_flags
from experiments.methods import names as methods
from experiments.methods import search
from experiments.methods import tuned as tuned_file
from experiments.reporting import tables
from experiments.runtime import files
from experiments.runtime import main as entry_point
from experiments.training import flags as run_flags
from experiments.training.folder import failures_error
from lpa_jax import checks, multihost
from lpa_jax.files import refuse_if_held
from lpa_jax.training.interrupts import Interrupts

FLAGS = flags.FLAGS


def define_flags() -> None:
    domain_flags.define_flags("runs/domain_generalization")
    run_flags.define_seeds(about="; paired over methods")
    flags.DEFINE_integer("draws", 1, "Sets of hyperparameters of each method; 1: fixed ones.")
    flags.DEFINE_bool(
        "leave_two_out", False, "Also train without each pair of domains, for cross-validation."
    )
    files.define_path(
        "hparams",
        "auto",
        "File of tuned hyperparameters from experiments.domain_tune; auto takes the one that comes "
        "with the project for this data set and model, none takes the methods' defaults.",
    )


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
    """All runs; seeds outermost, so that an interrupted experiment leaves complete pairs.

    Raises:
      ValueError: naming the flag that does not fit.
    """
    checks.integer("--draws", FLAGS.draws, 1, 10**4)
    if FLAGS.draws > 1 and FLAGS.hparams not in ("auto", "none"):
        raise ValueError(f"--draws={FLAGS.draws} draws hyperparameters: --hparams must be none")
    methods.check_different(FLAGS.methods)
    method_flags.check_reach(FLAGS.methods)
    hidden = method_flags.searched_layers(settings.model)
    ranges = domain_flags.search_ranges()
    for name in ("space", "search_layers", "learning_rate_range"):
        if FLAGS.draws == 1 and FLAGS[name].value:
            raise ValueError(f"--{name} needs --draws of at least 2: nothing is drawn")

    def options(method, seed, test, draw):
        found = tuned.options(method, test)
        if FLAGS.draws > 1:
            found = search.draw(method, draw, hidden, seed, ranges)
        return domain_flags.options_for(method, found, settings.train_steps)

    return [
        Run(method, seed, test, tuple(options(method, seed, test, d) for d in range(FLAGS.draws)))
        for seed in run_flags.seeds()
        for method in FLAGS.methods
        for test in tests
    ]


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
    tuned = tuned_hparams(settings)
    source = DomainSource(settings)
    tests = domain_flags.domains_to_test(source.names)
    runs = plan(settings, tests, tuned)
    run_flags.say(f"Hyperparameters: {tuned.origin}")
    doubts = tuned_file.notes(tuned, FLAGS.methods, settings)
    if doubts:
        run_flags.say(" ".join(doubts))
    workdir, first = pathlib.Path(FLAGS.workdir), multihost.is_first_host()
    if first:
        refuse_if_held(workdir)
    smallest = min(source.training_sizes)
    options = {run.method: run.draws[0] for run in runs}
    run_flags.warn(settings.batch_size, smallest, options)
    trainings = Trainings(
        settings,
        source,
        workdir / "trainings",
        FLAGS.layer,
        saving=run_flags.saving(),
        should_stop=interrupts,
    )
    results, failed = train_all(
        runs,
        trainings,
        workdir,
        interrupts,
        leave_two_out=FLAGS.leave_two_out,
        quiet=FLAGS.quiet or not first,
    )
    title = f"{settings.dataset}, {settings.model}, accuracy on test domains"
    if first and results:
        doubts = [*doubts, *(f"Failed: {line}." for line in failed)]
        doubts += selection.tie_note([result["selected"] for result in results])
        limits = [*doubts, *_notes(tuned, tests, source.names)]
        by_method: dict[str, list[Mapping[str, Any]]] = {}
        for result in results:
            by_method.setdefault(result["method"], []).append(result)
        tables.write_comparison(title, by_method, workdir, limits, quiet=FLAGS.quiet)
    if failed:
        raise failures_error(failed, len(runs))


def main(argv: list[str]) -> None:
    entry_point.run(argv, compare)


if __name__ == "__main__":
    entry_point.start(define_flags, main)
