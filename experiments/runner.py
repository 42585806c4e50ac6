"""One run: a method on a task with a seed, from the first step to a complete result file."""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments import files, task_data
from experiments.assembly import Assembled, assemble, traceable
from experiments.recording import RunLog
from experiments.run_folder import RunFolder
from experiments.saving import Saving
from experiments.settings import Settings, Task, shot_groups
from lpa_jax import data, losses, metrics, models, multihost, optimizers, parallel, trainer
from lpa_jax.accumulation import accumulate
from lpa_jax.diagnostics import perturbation_effect
from lpa_jax.injection import as_network
from lpa_jax.interrupts import InterruptedRunError
from lpa_jax.prefetch import Prefetched
from lpa_jax.step import TrainState, eval_step, lpa_step

DEFAULT_SAVING = Saving()


class Program(NamedTuple):
    """What all seeds of a method share: traced and compiled once.

    The method's numbers (radii, rates, the learning rate) are arguments of the compiled steps, not
    constants in them: methods that differ in numbers alone share one entry of the compilation
    cache, which makes a search over them several times faster.

    Attributes:
      method: its name.
      options: resolved options, as written to the configuration.
      settings: the settings, with the method's own learning rate and weight decay.
      init: (seed) -> initial train state.
      stages: (first epoch, step) pairs.
      evaluate: evaluation step.
      effect: (state, batch) -> effect of the perturbations, or None without any.
      place: (batch) -> what the steps take, made ahead: the batch on its way to the devices.
      with_options: (options) -> the program of options that differ in numbers alone, nothing being
        traced or compiled anew; see `structure`.
    """

    method: str
    options: Mapping[str, Any]
    settings: Settings
    init: Callable[[int], TrainState]
    stages: tuple[tuple[int, trainer.Step], ...]
    evaluate: Callable[..., Any]
    effect: Callable[..., Any] | None
    place: Callable[[Mapping[str, Any]], Any] = lambda batch: batch
    with_options: Callable[[Mapping[str, Any]], "Program"] | None = None


def structure(method: str, options: Mapping[str, Any]) -> str:
    """What is compiled in of a method's options: the names of its numbers, and all the rest.

    >>> structure("lpa", {"lpa.radius": 0.1, "lpa.steps": 3})
    '{"lpa.radius": "traced", "lpa.steps": 3}'
    """
    numbers = dict.fromkeys(traceable(method, options), "traced")
    return json.dumps(files.plain({**options, **numbers}), sort_keys=True)


def make_program(
    method: str,
    options: Mapping[str, Any],
    settings: Settings,
    task: Task,
    layer: str | None = None,
) -> Program:
    """Builds model, perturbations, optimiser and steps for tasks shaped like `task`.

    Raises:
      ValueError: naming the flag that does not fit.
    """
    num_classes = task.train.num_classes
    model = settings.network(num_classes)
    trained_model = over_devices(settings, model)
    recipe = _Recipe(method, settings, task, as_network(model).layers, layer)
    options = dict(options)
    known = recipe.mix(options)  # refuses bad values before anything is compiled
    batch_shape = (settings.batch_size, *task.train.image_shape)
    example = {"image": np.zeros(batch_shape, np.float32)}
    normalize = task.normalization.apply
    transform = settings.transform(task.train.image_shape)
    loaded = settings.initial_variables(model, task.train.image_shape)

    def preprocess(rng, images, positions):
        return normalize(transform(rng, images, positions))

    def train_step(stage, state_and_numbers, batch, axis_name=None):
        state, numbers = state_and_numbers
        mixed = recipe.mix(options | numbers)
        new_state, pairs = lpa_step(
            state.replace(optimizer=mixed.optimizer),
            batch,
            perturbations=mixed.parts.perturbations,
            penalties=mixed.parts.penalties,
            loss=mixed.loss_stages[stage][1],
            augment=preprocess,
            axis_name=axis_name,
        )
        return (new_state.replace(optimizer=state.optimizer), numbers), pairs

    def evaluate(state_and_numbers, batch, axis_name=None):
        state, numbers = state_and_numbers
        adjust = recipe.mix(options | numbers).parts.adjust_logits
        batch = {**batch, "image": normalize(batch["image"])}
        return eval_step(state, batch, adjust_logits=adjust, axis_name=axis_name)

    @jax.jit
    def effect(state, numbers, batch):
        return perturbation_effect(
            as_network(model),  # measured on one device, whatever it was trained on
            state.variables,
            state.perturbation_state,
            {**batch, "image": normalize(batch["image"])},
            perturbations=_fixed(recipe.mix(options | numbers).parts.perturbations),
            loss=losses.cross_entropy,
            rng=jax.random.fold_in(state.rng, state.step),
        )

    mapped_stages = [
        (
            first,
            parallel.map_step(
                functools.partial(train_step, stage), donate_state=True, num_classes=num_classes
            ),
        )
        for stage, (first, _) in enumerate(known.loss_stages)
    ]
    mapped_evaluation = parallel.map_step(evaluate, num_classes=num_classes)
    unbound = Program(
        method=method,
        options={},
        settings=settings,
        # No number has a part in the first state.
        init=lambda seed: parallel.with_own_buffers(
            TrainState.create(
                trained_model,
                known.optimizer,
                jax.random.key(seed),
                example,
                known.parts.perturbations,
                known.parts.penalties,
                loaded,
            )
        ),
        stages=(),
        place=mapped_evaluation.place,
        evaluate=mapped_evaluation,
        effect=effect if _fixed(known.parts.perturbations) else None,
    )

    def with_options(bound_options):
        if structure(method, bound_options) != structure(method, options):
            raise ValueError(f"options of {method} that differ in more than numbers: make_program")
        recipe.mix(bound_options)
        return _bound(unbound, mapped_stages, dict(bound_options), with_options)

    return with_options(options)


def _bound(unbound: Program, mapped_stages, options, with_options) -> Program:
    """The program whose compiled steps get the numbers of some options."""
    numbers = {name: np.float32(options[name]) for name in traceable(unbound.method, options)}

    def stage_step(mapped):
        def step(state, batch):
            (state, _), pairs = mapped((state, numbers), batch)
            return state, pairs

        return step

    effect = unbound.effect
    return unbound._replace(
        options=options,
        stages=tuple((first, stage_step(mapped)) for first, mapped in mapped_stages),
        evaluate=lambda state, batch: unbound.evaluate((state, numbers), batch),
        effect=effect and (lambda state, batch: effect(state, numbers, batch)),
        with_options=with_options,
    )


def over_devices(settings: Settings, model: models.StagedModel) -> Any:
    """The model as it is trained: its batch norms synchronised, its passes in parts."""
    if settings.sync_batch_norm:
        try:
            model = settings.network(model.num_classes, axis_name=parallel.batch_axis())
        except ValueError as error:
            raise ValueError(f"--sync_batch_norm: {error}") from None
    return accumulate(model, settings.accumulate)


class _Mixed(NamedTuple):
    """A method with its options put in."""

    parts: Assembled
    optimizer: optax.GradientTransformation
    loss_stages: tuple[tuple[int, losses.Loss], ...]


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How a method is built from options, whose numbers are known outside jit and traced inside."""

    method: str
    settings: Settings
    task: Task
    layers: tuple[str, ...]
    layer: str | None

    def mix(self, options: Mapping[str, Any]) -> _Mixed:
        settings, counts = self.settings, self.task.counts
        steps_per_epoch = -(-len(self.task.train) // settings.batch_size)
        parts = assemble(
            self.method,
            options,
            layers=self.layers,
            layer=self.layer,
            counts=counts,
            epochs=settings.epochs,
            total_steps=settings.epochs * steps_per_epoch,
            head=settings.head,
        )
        optimizer = _optimizer(settings, steps_per_epoch, options)
        if parts.sam_rho is not None:
            optimizer = optimizers.sam(optimizer, parts.sam_rho)
        return _Mixed(parts, optimizer, parts.loss_stages or _loss_stages(settings, counts))


def _fixed(perturbations: Mapping[Any, Any]) -> dict[str, Any]:
    """Those at one layer: where a step draws the layer there is no one effect to measure."""
    return {layer: p for layer, p in perturbations.items() if isinstance(layer, str)}


def _optimizer(settings: Settings, steps_per_epoch: int, options: Mapping[str, Any]):
    rate = optimizers.schedule(
        settings.schedule,
        options.get("learning_rate", settings.learning_rate),
        total_steps=settings.epochs * steps_per_epoch,
        warmup_steps=round(settings.warmup_epochs * steps_per_epoch),
        milestones=settings.milestones,
        factor=settings.decay_factor,
    )
    return optimizers.create(
        settings.optimizer,
        rate,
        weight_decay=options.get("weight_decay", settings.weight_decay),
        clip_norm=settings.clip_norm,
        decay_biases_and_norms=settings.decay_biases_and_norms,
    )


def _loss_stages(settings: Settings, counts) -> tuple[tuple[int, losses.Loss], ...]:
    if settings.drw_epoch is not None:
        return losses.drw_stages(counts, settings.drw_epoch)
    return ((0, losses.create(settings.loss, counts)),)


def configuration(program: Program, seed: int, task: Task) -> dict[str, Any]:
    """Everything that decides a run's result, as plain values."""
    settings = program.settings.as_dict()
    for folder in ("data_dir", "image_root"):
        settings.pop(folder)
    for name in ("accumulate", "sync_batch_norm"):  # not there when earlier runs were made
        if settings[name] == getattr(Settings, name):
            settings.pop(name)
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
    saving: Saving = DEFAULT_SAVING,
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
      saving: when to save checkpoints, and which remain.
      should_stop: asked after every step and before every evaluation batch; True saves and raises.
        Several hosts must get the same answer at the same time, as `Interrupts` gives it.
      say: called with a line for each damaged checkpoint.

    Returns:
      The result: final accuracy, per-class accuracy, group accuracies, curves, seconds.

    Raises:
      ValueError: the folder holds another run.
      trainer.NonFiniteLossError: the loss diverged; nothing counts as a result then.
      lpa_jax.checkpoint.CheckpointError: no room to save, or no intact checkpoint to go on from.
      InterruptedRunError: `should_stop` said so; the same call goes on from there.
    """
    run_folder = RunFolder(folder, configuration(program, seed, task), saving)
    earlier = run_folder.result()
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
    probe = data.batches(task.train, seed, settings.batch_size)[0]
    steps_per_epoch = train_batches.steps_per_epoch
    record = None
    with (
        RunLog(
            folder if multihost.is_first_host() else None, restored.notes.get("rows", ())
        ) as log,
        Prefetched(train_batches, program.place) as train_batches,
    ):
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
            save=lambda state, totals: run_folder.save(
                state, totals, {"rows": log.rows, "seconds": time.perf_counter() - started}
            ),
            should_save=saving.schedule(steps_per_epoch, settings.epochs * steps_per_epoch),
            should_stop=should_stop,
            block_every_step=parallel.must_block(),
        ):
            scalars = _scalars(record)
            if record.evaluation is not None:
                run_folder.score(record.step, record.evaluation["accuracy"])
                scalars |= _effects(program, state, probe)
            log.write(record.step, scalars)
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
            **_final_metrics(record.evaluation, task.counts),
            "curve": log.rows,
        }
    )


def _effects(program: Program, state: TrainState, probe: Mapping[str, Any]) -> dict[str, float]:
    if program.effect is None:
        return {}
    effect = metrics.compute(program.effect(state, probe))
    return {f"effect/{name}": value for name, value in effect.items()}


def _evaluation_batch_size(size: int) -> int:
    """At most 500 (activations of larger batches fall out of cache), a multiple of the devices."""
    devices = jax.device_count()
    return -(-min(size, 500) // devices) * devices


def _scalars(record: trainer.EpochRecord) -> dict[str, float]:
    scalars = {"epoch": record.epoch, "step": record.step}
    scalars |= {f"train/{name}": value for name, value in record.train.items()}
    if record.evaluation is not None:
        scalars |= {f"evaluation/{name}": record.evaluation[name] for name in ("loss", "accuracy")}
    scalars["examples_per_second"] = record.examples_per_second
    return scalars


def _final_metrics(evaluation: Mapping[str, Any], counts: tuple[int, ...]) -> dict[str, Any]:
    per_class = np.asarray(evaluation["per_class_accuracy"])
    groups = {
        name: float(np.nanmean(per_class[members])) for name, members in shot_groups(counts).items()
    }
    return {
        "accuracy": evaluation["accuracy"],
        "loss": evaluation["loss"],
        "per_class_accuracy": per_class,
        "group_accuracy": groups,
    }
