"""The comparison of methods with paired seeds that `long_tail` and `balanced` run.

Trains every method with every seed, except finished runs, prints one table, and writes it with
figures, logs and the configuration.
"""

import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from absl import flags

from experiments.images import flags as image_flags
from experiments.images.data import TaskSource
from experiments.images.job import ImageJob
from experiments.images.settings import Settings
from experiments.methods import flags as method_flags
from experiments.methods import names as methods
from experiments.methods import tuned as tuned_file
from experiments.reporting import class_figures, figures, frame, tables
from experiments.runtime import fields, files, hosts
from experiments.runtime import main as entry_point
from experiments.runtime.progress import RunProgress
from experiments.training import flags as run_flags
from experiments.training import folder, run
from experiments.training.log import Logging
from experiments.training.program import Programs
from lpa_jax import data, multihost
from lpa_jax.files import refuse_if_held
from lpa_jax.training.interrupts import Interrupts
from lpa_jax.training.loop import NonFiniteLossError

FLAGS = flags.FLAGS


def define_flags(experiment: str, profile: str) -> None:
    """Flags of a comparison, with the defaults of the experiment of that name."""
    flags.DEFINE_list(
        "methods",
        ["erm", "lpl", "lpa", "lpa+lpl"],
        "Methods to compare: erm, any perturbation, or sums such as lpa+lpl; dropout@hidden2 names "
        "the layer, manifold_mixup@input|hidden1 layers of which each step draws one.",
    )
    run_flags.define_seeds(about="; paired over methods")
    files.define_path(
        "workdir", f"runs/{experiment}", "Folder for everything that is written.", folder=True
    )
    files.define_path(
        "hparams",
        "auto",
        "File of tuned hyperparameters from experiments.tune; auto takes the one that comes with "
        "the project for this data set and model, none takes the methods' defaults.",
    )
    fields.define(Logging)
    image_flags.define(profile)
    fields.define(method_flags.Perturbing)
    run_flags.define_runtime_flags()


def resolve_options(
    pooled: Mapping[str, Mapping[str, Any]], own: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Options of every chosen method: defaults, then tuned or else the recipe's, then flags.

    Args:
      pooled: tuned options by method.
      own: flags that the experiment itself uses, whether or not a method does.
    """
    methods.check_different(FLAGS.methods)
    method_flags.check_reach(FLAGS.methods, own)
    return {
        method: method_flags.options_for(
            method, pooled.get(method) or image_flags.recipe_options(method)
        )
        for method in FLAGS.methods
    }


def jobs(
    settings: Settings, options: Mapping[str, Mapping[str, Any]], source: TaskSource
) -> list[ImageJob]:
    """Every method with every seed; seeds outermost, so that an interrupted job leaves pairs.

    Raises:
      ValueError: a flag or option that does not fit.
    """
    programs = Programs(settings, FLAGS.layer)
    tasks = {seed: source.task(seed) for seed in run_flags.seeds()}
    run_flags.warn(settings.batch_size, min(sum(task.counts) for task in tasks.values()), options)
    return [
        ImageJob(
            programs.program(method, options[method], task),
            task,
            seed,
            class_batches=FLAGS.class_geometry_batches,
        )
        for seed, task in tasks.items()
        for method in options
    ]


def folder_of(workdir: pathlib.Path, method: str, seed: int) -> pathlib.Path:
    """The folder of a run."""
    return workdir / "runs" / method / f"seed_{seed}"


def train_all(
    settings: Settings,
    options: Mapping[str, Mapping[str, Any]],
    workdir: pathlib.Path,
    interrupts: Interrupts,
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Trains every method with every seed, except finished runs.

    A run that diverges is recorded as failed, and the others are trained.

    Returns:
      Results by method, and a line for each run that failed.
    """
    first = multihost.is_first_host()
    if first:
        refuse_if_held(workdir)  # before data are read
    saving = run_flags.saving()
    logging = fields.read(Logging)
    source = TaskSource(settings)
    # Every program is built before the first run, so that a bad option stops everything at once.
    planned = jobs(settings, options, source)
    progress = RunProgress(len(planned), settings.epochs, FLAGS.quiet or not first)
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in options}
    failed: list[str] = []
    hosts.check(workdir, [job.configuration() for job in planned], hosts.UNFINISHED)
    with folder.held(workdir), interrupts:
        for job in planned:
            place = folder_of(workdir, job.program.method, job.seed)
            folder.check_inside(workdir, place)
            folder.finished_result(place, job.configuration(), job.names)
        folder.check_inside(workdir, workdir / "splits")
        run_flags.apply_runtime_flags()
        files.write_json(workdir / "flags.json", run_flags.resolved())
        if first:
            _write_splits(planned, settings, source, workdir)
        with progress:
            for job in planned:
                method = job.program.method
                place = folder_of(workdir, method, job.seed)
                progress.start(f"{method} seed {job.seed}")
                try:
                    result = run.run(
                        job,
                        place,
                        on_epoch=progress.epoch,
                        on_step=progress.step,
                        saving=saving,
                        logging=logging,
                        should_stop=interrupts,
                        say=progress.say,
                    )
                except NonFiniteLossError as error:
                    failed.append(f"{method} seed {job.seed}: {error}")
                    folder.record_failure(place, str(error))
                    progress.finish(f"failed: {error}")
                    continue
                progress.finish(f"{settings.evaluate_on} accuracy {100 * result['accuracy']:.2f} %")
                results[method].append(result)
    return results, failed


def _write_splits(
    planned: Sequence[ImageJob], settings: Settings, source: TaskSource, workdir: pathlib.Path
) -> None:
    """Writes which training examples every seed has."""
    for seed, task in {job.seed: job.task for job in planned}.items():
        meta = {"dataset": settings.dataset, "seed": seed, "counts": list(task.counts)}
        path = workdir / "splits" / f"seed_{seed}.json"
        data.save_indices(path, task.train_indices, source.pool.labels, meta)


def report(
    results: frame.Results, settings: Settings, workdir: pathlib.Path, notes: Sequence[str]
) -> None:
    """Prints the table and writes it with the figures, on the first host."""
    if not multihost.is_first_host():
        return
    figures.per_class_accuracy(results, workdir / "per_class_accuracy.png")
    figures.training_curves(results, workdir / "training_curves.png", settings.evaluate_on)
    class_figures.over_epochs(results, workdir / "class_geometry.png")
    title = frame.title_of(settings.as_dict())
    tables.write_comparison(title, results, workdir, notes, ("lpa", "lpl"), FLAGS.quiet)


def main(experiment: str, argv: list[str]) -> None:
    """Does what the flags say; exits with one line if they are wrong or the user interrupts."""

    def compare(interrupts):
        settings = image_flags.settings()
        hparams = tuned_file.find(FLAGS.hparams, experiment, settings)
        options = resolve_options(hparams.pooled)
        notes = tuned_file.notes(hparams, FLAGS.methods, settings)
        run_flags.say(f"Hyperparameters: {hparams.origin}")
        if notes:
            run_flags.say(" ".join(notes))
        image_flags.prepare_data()
        workdir = pathlib.Path(FLAGS.workdir)
        results, failed = train_all(settings, options, workdir, interrupts)
        known = {method: found for method, found in results.items() if found}
        if known:
            failures = [f"Failed: {line}." for line in failed]
            report(known, settings, workdir, [*notes, *failures])
        if failed:
            raise folder.failures_error(failed, sum(map(len, results.values())) + len(failed))

    entry_point.run(argv, compare)
