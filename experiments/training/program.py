"""A method compiled for a task: what all seeds and all trials of a search share."""

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from experiments.methods.build import Built, assemble, build, traceable
from experiments.methods.names import POSTHOC, RUN_OPTIONS, loss_names, parse, part_options
from experiments.runtime import fields, files
from experiments.training.settings import RunSettings
from experiments.training.task import Task
from lpa_jax import checks, losses, parallel
from lpa_jax.diagnostics import class_geometry, observe, perturbation_effect
from lpa_jax.injection import as_network
from lpa_jax.training.loop import Step
from lpa_jax.training.step import TrainState, eval_step, lpa_step


class Program:
    """A method for tasks of one shape, compiled once.

    The method's numbers (radii, rates, the learning rate) are arguments of the compiled steps. So
    options that differ in numbers alone share the compilation (`with_options`), which makes a
    search over them several times faster. All other options are compiled in.

    Args:
      method: its name.
      options: its resolved options.
      settings: settings of the run.
      task: a task like all that are trained on. The program keeps its normalisation and its
        number of training domains.
      layer: injection point of perturbations that name none.
      counts: training examples of each class, [C]; None: those of the task.

    Raises:
      ValueError: a flag or option that does not fit, before anything is compiled.
    """

    def __init__(
        self,
        method: str,
        options: Mapping[str, Any],
        settings: RunSettings,
        task: Task,
        layer: str | None = None,
        counts: Sequence[int] | None = None,
    ):
        self.method, self.options = method, dict(options)
        self.settings = settings = settings.with_options(options)
        self.length = task.length(settings)
        self._num_domains, self._layer = task.num_domains, layer
        self._counts = task.counts if counts is None else counts
        self._normalize, image_shape = task.normalization.apply, task.image_shape
        self._transform = settings.transform(image_shape)
        model = settings.network(task.num_classes)
        examples = settings.batch_size * (task.num_domains or 1)
        self._network = as_network(model)
        self._trained_network = as_network(settings.over_devices(model, examples))
        self._loaded = settings.initial_variables(model, image_shape)
        self._example = {"image": np.zeros((examples, *image_shape), np.float32)}
        known = self._build(self.options)
        self._numbers = self._traced_numbers()
        # No number is part of the first state, so that one compilation is enough.
        self._create = jax.jit(functools.partial(self._created, known))
        # Raises for layers that do not fit, before anything is written or compiled.
        jax.eval_shape(self._create, jax.random.key(0), self._loaded)
        map_step = functools.partial(parallel.map_step, num_classes=task.num_classes)
        self._stages = tuple(
            (first, map_step(functools.partial(self._train, stage), donate_state=True))
            for stage, (first, _) in enumerate(known.loss_stages)
        )
        self._evaluate = map_step(self._evaluated)
        self.place = self._evaluate.place
        self._effect, self._classes = jax.jit(self._effects), jax.jit(self._geometry)
        self.has_effects = bool(_at_one_layer(known.parts.perturbations))

    def with_options(self, options: Mapping[str, Any]) -> "Program":
        """This program with other numbers; nothing is traced or compiled again.

        Raises:
          ValueError: the options differ in more than numbers (see `structure`), or a number is out
            of range.
        """
        if structure(self.method, options) != structure(self.method, self.options):
            raise ValueError(f"options of {self.method} differ in more than numbers: {options}")
        self._build(options)
        program = copy.copy(self)
        program.options = dict(options)
        program._numbers = program._traced_numbers()
        return program

    def init(self, seed: int) -> TrainState:
        """The state before the first step, whose memory the steps may take over."""
        # jit may return the loaded weights themselves, and later runs need them.
        return parallel.with_own_buffers(self._create(jax.random.key(seed), self._loaded))

    @property
    def stages(self) -> tuple[tuple[int, Step], ...]:
        """(First epoch, training step) pairs."""
        return tuple((first, step.bind(self._numbers)) for first, step in self._stages)

    def evaluate(self, state: TrainState, batch: Mapping[str, Any]) -> Any:
        """The metrics of `lpa_jax.eval_step`, as pairs."""
        return self._evaluate(state, batch, self._numbers)

    def effect(self, state: TrainState, batch: Mapping[str, Any]) -> Any:
        """The effect of the perturbations on a batch by sign group; on one device."""
        return self._effect(state, self._numbers, batch)

    def classes(self, state: TrainState, batch: Mapping[str, Any]) -> Any:
        """The effect of the perturbations on every class, by layer; on one device."""
        return self._classes(state, self._numbers, batch)

    def _traced_numbers(self) -> dict[str, np.float32]:
        names = traceable(self.method, self.options)
        return {name: np.float32(self.options[name]) for name in names}

    def _build(self, options: Mapping[str, Any]) -> Built:
        """The method's parts; numbers are known outside jit and traced inside."""
        settings, length = self.settings, self.length
        for name in {*RUN_OPTIONS} & {*options}:
            if checks.is_known(options[name]):
                fields.check_value(RunSettings, name, options[name])
        parts = assemble(
            self.method,
            options,
            layers=self._network.layers,
            layer=self._layer,
            counts=self._counts,
            epochs=length.epochs,
            total_steps=length.total_steps,
            num_domains=self._num_domains,
            head=settings.head,
        )
        default = settings.default_loss(self._counts, options)
        return build(parts, settings, options, self._schedule(options), ((0, default),))

    def _schedule(self, options: Mapping[str, Any]) -> optax.Schedule:
        rate = options.get("learning_rate", self.settings.learning_rate)
        return self.settings.rate_schedule(rate, self.length)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return float(self._schedule(self.options)(step))

    def _created(self, known: Built, rng: jax.Array, loaded: Any) -> TrainState:
        return TrainState.create(
            self._trained_network,
            known.optimizer,
            rng,
            self._example,
            known.parts.perturbations,
            known.parts.penalties,
            loaded,
        )

    # What follows is compiled.

    def _train(self, stage: int, state: TrainState, batch, numbers, axis_name=None):
        built = self._build(self.options | numbers)
        # The optimizer of a state is static and cannot hold traced numbers, so that this step runs
        # with another one. Their states are alike.
        new_state, pairs = lpa_step(
            state.replace(optimizer=built.optimizer),
            batch,
            perturbations=built.parts.perturbations,
            penalties=built.parts.penalties,
            loss=built.loss_stages[stage][1],
            augment=lambda *of: self._normalize(self._transform(*of)),
            axis_name=axis_name,
        )
        return new_state.replace(optimizer=state.optimizer), pairs

    def _evaluated(self, state: TrainState, batch, numbers, axis_name=None):
        adjust = self._build(self.options | numbers).parts.adjust_logits
        return eval_step(state, self._normalized(batch), adjust_logits=adjust, axis_name=axis_name)

    def _effects(self, state: TrainState, numbers, batch):
        return perturbation_effect(
            self._network,
            state.variables,
            state.perturbation_state,
            self._normalized(batch),
            perturbations=_at_one_layer(self._build(self.options | numbers).parts.perturbations),
            loss=losses.cross_entropy,
            rng=jax.random.fold_in(state.rng, state.step),
        )

    def _geometry(self, state: TrainState, numbers, batch):
        seen = observe(
            self._network,
            state.variables,
            self._normalized(batch),
            _at_one_layer(self._build(self.options | numbers).parts.perturbations),
            rng=jax.random.fold_in(state.rng, state.step),
            states=state.perturbation_state,
            train=True,
        )
        return {
            layer: class_geometry(one, batch["label"], state.num_classes)
            for layer, one in seen.items()
        }

    def _normalized(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {**batch, "image": self._normalize(batch["image"])}


class Programs:
    """The programs of an experiment: options and tasks that compile to the same share one.

    Args:
      settings: settings of all runs.
      layer: injection point of perturbations that name none.
    """

    def __init__(self, settings: RunSettings, layer: str | None = None):
        self._settings, self._layer = settings, layer
        self._compiled: dict[tuple, Program] = {}

    def program(self, method: str, options: Mapping[str, Any], task: Task) -> Program:
        """The program of a method's options for a task.

        Raises:
          ValueError: a flag or option that does not fit, or a number that is out of range.
        """
        counts = None
        if needs_counts(method, options) or self._settings.loss_needs_counts:
            counts = task.counts
        length = task.length(self._settings)
        key = (method, structure(method, options), task.num_domains, length, counts)
        if key not in self._compiled:
            counts = counts or (1,) * task.num_classes
            self._compiled[key] = Program(
                method, options, self._settings, task, self._layer, counts
            )
        return self._compiled[key].with_options(options)


def structure(method: str, options: Mapping[str, Any]) -> str:
    """A method's options as they are compiled in: the names of its numbers, and everything else.

    >>> structure("lpa", {"lpa.radius": 0.1, "lpa.steps": 3})
    '{"lpa.radius": "traced", "lpa.steps": 3}'
    """
    numbers = dict.fromkeys(traceable(method, options), "traced")
    return json.dumps(files.plain({**options, **numbers}), sort_keys=True)


def needs_counts(method: str, options: Mapping[str, Any]) -> bool:
    """Whether a method is compiled with the class sizes, which differ between tasks.

    >>> needs_counts("lpa", {"lpa.assignment": "confidence"}), needs_counts("logit_adjusted", {})
    (False, True)
    """
    for part in parse(method):
        if part.name in (*loss_names(), POSTHOC):
            return True
        rule = options.get(f"{part.name}.assignment", "frequency")
        if "assignment" in part_options(part.name) and rule == "frequency":
            return True
    return False


def _at_one_layer(perturbations: Mapping[Any, Any]) -> dict[str, Any]:
    """Without those whose layer is drawn in every step: they have no one effect to measure."""
    return {layer: p for layer, p in perturbations.items() if isinstance(layer, str)}
