"""One run: a method on a task with a seed, from the first step to a complete result file."""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from experiments.images import data as task_data
from experiments.images.settings import Task
from experiments.runtime import files
from experiments.training import run_rows
from experiments.training.folder import RunFolder
from experiments.training.log import Logging, RunLog
from experiments.training.program import Program
from experiments.training.saving import Saving
from lpa_jax import data, multihost, parallel
from lpa_jax.data.prefetch import Prefetched
from lpa_jax.interrupts import InterruptedRunError
from lpa_jax.training import loop as trainer

DEFAULT_SAVING = Saving()
DEFAULT_LOGGING = Logging()


def configuration(program: Program, seed: int, task: Task) -> dict[str, Any]:
    """Everything that decides a run's result, as plain values."""
    settings = program.settings.as_dict()
    for folder in ("data_dir", "image_root"):
        settings.pop(folder)
    return files.plain(
        {
            "method": program.method,
            "seed": seed,
            "options": dict(program.options),
            "settings": settings,
            "train_counts": task.counts,
        }
    )


def run(
    program: Program,
    task: Task,
    seed: int,
    folder: pathlib.Path | None,
    on_epoch: Callable[[trainer.EpochRecord], None] = lambda record: None,
    *,
    on_step: Callable[[int, float, trainer.Totals], None] = lambda step, epochs, totals: None,
    saving: Saving = DEFAULT_SAVING,
    logging: Logging = DEFAULT_LOGGING,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Trains and evaluates; writes log, configuration and result into `folder` (None: nowhere).

    A folder that holds the complete result of the same run is read instead. One that holds its
    checkpoints goes on from the newest intact one, to the same result bit for bit.

    Args:
      program: from `make_program`.
      task: data.
      seed: decides the initial parameters and the order of the data.
      folder: of this run alone.
      on_epoch: called after every epoch.
      on_step: called after the steps between, with their number, the same in epochs and the sums of
        the epoch's metrics, which may still be computed.
      saving: when to save checkpoints, and which remain.
      logging: what is logged beyond scalars; it changes no number of the run.
      should_stop: asked after every step and before every evaluation batch; True saves and raises.
        Several hosts must get the same answer at the same time, as `Interrupts` gives it.
      say: called with a line for each damaged checkpoint or file.

    Returns:
      The result: final accuracy, per-class accuracy, group accuracies, curves, seconds.

    Raises:
      ValueError: the folder holds another run.
      trainer.NonFiniteLossError: the loss diverged; nothing counts as a result then.
      CheckpointError: no room to save, or no intact checkpoint to go on from.
      hosts.DifferingHostsError: processes would not go on from the same.
      InterruptedRunError: `should_stop` said so; the same call goes on from there.
    """
    run_folder = RunFolder(folder, configuration(program, seed, task), saving)
    earlier = run_folder.result(say)
    if earlier is not None:
        return earlier
    if should_stop():
        raise InterruptedRunError("stopped before the run began")
    settings = program.settings
    started = time.perf_counter()
    restored = run_folder.begin(program.init(seed), say)
    started -= restored.notes.get("seconds", 0.0)
    train_batches = task_data.train_batches(task.train, seed, settings.batch_size)
    eval_batches = task_data.evaluation_batches(
        task.evaluation, _evaluation_batch_size(len(task.evaluation))
    )
    # The same for all hosts; nobody's share of the global batch.
    probes = data.batches(task.train, seed, settings.batch_size)
    steps_per_epoch = train_batches.steps_per_epoch
    record = None
    with (
        RunLog(
            folder if multihost.is_first_host() else None, restored.notes.get("rows", ()), logging
        ) as log,
        Prefetched(train_batches, program.place) as train_batches,
    ):

        def notes():
            return {"rows": log.rows, "seconds": time.perf_counter() - started}

        for state, record in trainer.train(
            restored.state,
            program.stages,
            train_batches,
            settings.epochs,
            evaluate=lambda s: trainer.evaluate_batches(
                program.evaluate, s, eval_batches, should_stop
            ),
            evaluate_every=settings.evaluate_every,
            totals=restored.totals,
            save=lambda state, totals: run_folder.save(state, totals, notes()),
            should_save=saving.schedule(steps_per_epoch, settings.epochs * steps_per_epoch),
            should_stop=should_stop,
            watch=lambda done, totals: on_step(done, done / steps_per_epoch, totals),
            block_every_step=parallel.must_block(),
        ):
            scalars = run_rows.scalars(record)
            if record.evaluation is not None:
                scalars |= run_rows.effects(program, state, probes[0])
                count = min(logging.class_batches, steps_per_epoch)
                scalars |= run_rows.classes(program, state, [probes[step] for step in range(count)])
            log.write(record.step, scalars, **run_rows.details(logging, state, record))
            if record.evaluation is not None:
                run_folder.score(state, record.evaluation["accuracy"], notes())
            on_epoch(record)
    if record is None or record.epoch < settings.epochs:
        raise InterruptedRunError("stopped, and what was done is saved")
    return run_folder.finish(
        {
            "complete": True,
            "method": program.method,
            "seed": seed,
            "seconds": time.perf_counter() - started,
            "evaluated_on": settings.evaluate_on,
            "train_counts": task.counts,
            **run_rows.final_metrics(record.evaluation, task.counts),
            "curve": log.rows,
        }
    )


def _evaluation_batch_size(size: int) -> int:
    """At most 500 (activations of larger batches fall out of cache), a multiple of the devices."""
    devices = jax.device_count()
    return -(-min(size, 500) // devices) * devices
