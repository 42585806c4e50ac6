"""A method compiled for classification: what all its seeds, and all trials of a search, share."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.images.settings import Settings, Task
from experiments.methods.build import Mixed, assemble, mixed, traceable
from experiments.runtime import files
from experiments.training import traced_step
from lpa_jax import losses, optimizers, parallel
from lpa_jax.diagnostics import class_geometry, observe, perturbation_effect
from lpa_jax.injection import Network, as_network
from lpa_jax.training import loop as trainer
from lpa_jax.training.step import TrainState, eval_step


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
      classes: (state, batch) -> layer -> what the perturbations do to every class, likewise.
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
    classes: Callable[..., Any] | None = None
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
    model = settings.network(task.train.num_classes)
    trained_model = settings.over_devices(model, settings.batch_size)
    network = as_network(model)
    recipe = _Recipe(method, settings, task, network.layers, layer)
    known = recipe.mix(options)  # refuses bad values before anything is compiled
    image_shape = task.train.image_shape
    loaded = settings.initial_variables(model, image_shape)
    example = {"image": np.zeros((settings.batch_size, *image_shape), np.float32)}
    steps = _Steps(recipe, dict(options), network, settings.transform(image_shape))
    map_step = functools.partial(parallel.map_step, num_classes=task.train.num_classes)
    mapped_stages = tuple(
        (first, map_step(functools.partial(steps.train, stage), donate_state=True))
        for stage, (first, _) in enumerate(known.loss_stages)
    )
    mapped_evaluation = map_step(steps.evaluate)
    effect, classes = jax.jit(steps.effect), jax.jit(steps.classes)
    measurable = bool(_fixed(known.parts.perturbations))

    def init(seed: int) -> TrainState:
        # No number has a part in the first state.
        parts = known.parts
        return parallel.with_own_buffers(
            TrainState.create(
                trained_model,
                known.optimizer,
                jax.random.key(seed),
                example,
                parts.perturbations,
                parts.penalties,
                loaded,
            )
        )

    def with_options(own: Mapping[str, Any]) -> Program:
        if structure(method, own) != structure(method, options):
            raise ValueError(f"options of {method} that differ in more than numbers: make_program")
        recipe.mix(own)
        numbers = {name: np.float32(own[name]) for name in traceable(method, own)}
        return Program(
            method=method,
            options=dict(own),
            settings=settings,
            init=init,
            stages=tuple(
                (first, traced_step.with_numbers(step, numbers)) for first, step in mapped_stages
            ),
            place=mapped_evaluation.place,
            evaluate=lambda state, batch: mapped_evaluation((state, numbers), batch),
            effect=functools.partial(_measure, effect, numbers) if measurable else None,
            classes=functools.partial(_measure, classes, numbers) if measurable else None,
            with_options=with_options,
        )

    return with_options(options)


def _measure(compiled: Callable[..., Any], numbers, state: TrainState, batch) -> Any:
    return compiled(state, numbers, batch)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The pure functions that are compiled; a method's numbers come in with the state."""

    recipe: "_Recipe"
    options: Mapping[str, Any]
    network: Network
    transform: Callable[..., jax.Array]

    def _mix(self, numbers: Mapping[str, jax.Array]) -> Mixed:
        return self.recipe.mix({**self.options, **numbers})

    def _normalized(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {**batch, "image": self.recipe.task.normalization.apply(batch["image"])}

    def train(self, stage: int, state_and_numbers, batch, axis_name=None):
        normalize = self.recipe.task.normalization.apply
        return traced_step.train(
            state_and_numbers,
            batch,
            self._mix(state_and_numbers[1]),
            stage,
            augment=lambda *of: normalize(self.transform(*of)),
            axis_name=axis_name,
        )

    def evaluate(self, state_and_numbers, batch, axis_name=None):
        state, numbers = state_and_numbers
        adjust = self._mix(numbers).parts.adjust_logits
        return eval_step(state, self._normalized(batch), adjust_logits=adjust, axis_name=axis_name)

    # Both are measured on one device, whatever the network was trained on.

    def effect(self, state, numbers, batch):
        return perturbation_effect(
            self.network,
            state.variables,
            state.perturbation_state,
            self._normalized(batch),
            perturbations=_fixed(self._mix(numbers).parts.perturbations),
            loss=losses.cross_entropy,
            rng=jax.random.fold_in(state.rng, state.step),
        )

    def classes(self, state, numbers, batch):
        seen = observe(
            self.network,
            state.variables,
            self._normalized(batch),
            _fixed(self._mix(numbers).parts.perturbations),
            rng=jax.random.fold_in(state.rng, state.step),
            states=state.perturbation_state,
            train=True,
        )
        num_classes = self.recipe.task.train.num_classes
        return {
            layer: class_geometry(one, batch["label"], num_classes) for layer, one in seen.items()
        }


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How a method is built from options, whose numbers are known outside jit and traced inside."""

    method: str
    settings: Settings
    task: Task
    layers: tuple[str, ...]
    layer: str | None

    def mix(self, options: Mapping[str, Any]) -> Mixed:
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
        rate = _rate(settings, steps_per_epoch, options)
        return mixed(parts, settings, options, rate, _loss_stages(settings, counts))


def _fixed(perturbations: Mapping[Any, Any]) -> dict[str, Any]:
    """Those at one layer: where a step draws the layer there is no one effect to measure."""
    return {layer: p for layer, p in perturbations.items() if isinstance(layer, str)}


def _rate(settings: Settings, steps_per_epoch: int, options: Mapping[str, Any]) -> optax.Schedule:
    return optimizers.schedule(
        settings.schedule,
        options.get("learning_rate", settings.learning_rate),
        total_steps=settings.epochs * steps_per_epoch,
        warmup_steps=round(settings.warmup_epochs * steps_per_epoch),
        milestones=settings.milestones,
        factor=settings.decay_factor,
    )


def _loss_stages(settings: Settings, counts) -> tuple[tuple[int, losses.Loss], ...]:
    return ((0, losses.create(settings.loss, counts)),)
