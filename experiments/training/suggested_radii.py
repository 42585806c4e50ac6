"""Radii to search around, from `lpa_jax.suggest_radius`.

The effect of a radius differs between layers and models, so that one range for all of them is
either wide or wrong. With `--radius_center=suggest` a search draws the radii of LPA and LPL within
a factor of 10 of the suggestion.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax

from experiments.methods import names as methods
from experiments.methods import search
from experiments.methods.build import assemble
from experiments.training.program import Program
from experiments.training.settings import RunSettings
from experiments.training.task import Task
from lpa_jax import models, parallel
from lpa_jax.diagnostics import suggest_radius
from lpa_jax.injection import LOGITS

CENTERS = ("range", "suggest")
SPREAD = 10.0
# Before training all classes have the same loss, so that the network is first trained by plain ERM
# for this share of the epochs.
WARMUP = 0.1
_PARTS = ("lpa", "lpl")
_BATCH_SIZE = 256


def check_ranges(ranges: Collection[str]) -> None:
    """Refuses ranges of radii that are drawn around suggestions instead.

    Args:
      ranges: options whose range is given, such as `lpa.radius`.

    Raises:
      ValueError: LPA's or LPL's radius is among them.
    """
    for part in _PARTS:
        if f"{part}.radius" in ranges:
            raise ValueError(
                f"--space: {part}.radius is drawn around the suggestion with "
                "--radius_center=suggest; give one of the two"
            )


class Suggestions:
    """Suggested radii by part and layer, each measured once: a pure function of task and seed.

    Nothing is measured before it is needed.
    """

    def __init__(
        self, settings: RunSettings, task: Task, seed: int, explicit: Mapping[str, Any]
    ) -> None:
        """Sets what to measure with.

        Args:
          settings: of the search.
          task: whose training images the networks see.
          seed: of the warm-up.
          explicit: options from flags, the same in every trial.
        """
        self._settings, self._task, self._seed, self._explicit = settings, task, seed, explicit
        self._layers = models.create(settings.model, task.num_classes).layers
        self._hidden = search.hidden_layers(settings.model)
        self._warm = None
        self._centers: dict[tuple[str, str], float] = {}

    def recentred(self, method: str, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """A trial's draw with every radius of LPA and LPL moved around its suggestion.

        Raises:
          ValueError: there is no radius to suggest.
        """
        drawn = dict(drawn)
        for part in methods.parse(method):
            if part.name not in _PARTS:
                continue
            options = methods.options_for(method, drawn, self._explicit)
            layer = part.layer or options.get(f"{part.name}.layer", LOGITS)
            key = f"{part.name}.radius"
            center = self._center(part.name, layer, options)
            around = search.LogUniform(center / SPREAD, center * SPREAD)
            at = part.layer or drawn.get(f"{part.name}.layer", LOGITS)
            drawn[key] = search.moved(
                drawn[key], search.radius_space(part.name, at, self._hidden), around
            )
        return drawn

    def _center(self, name: str, layer: str, options: Mapping[str, Any]) -> float:
        if (name, layer) not in self._centers:
            self._centers[name, layer] = self._suggest(name, layer, options)
        return self._centers[name, layer]

    def _suggest(self, name, layer, options) -> float:
        cold = {key: value for key, value in options.items() if key != f"{name}.mode"}

        def method(radius):
            traced = cold | {f"{name}.radius": radius}
            assembled = assemble(
                f"{name}@{layer}", traced, layers=self._layers, layer=None, counts=self._task.counts
            )
            return assembled.perturbations[layer]

        state = self._warm_state()
        examples = min(_BATCH_SIZE, sum(self._task.counts))
        settings = dataclasses.replace(self._settings, batch_size=examples)
        batch = self._task.train_batches(settings, self._seed)[0]
        image = self._task.normalization.apply(batch["image"])
        try:
            return suggest_radius(
                state.network,
                state.variables,
                {**batch, "image": image},
                layer,
                method=method,
                axis_name=parallel.batch_axis(),
            )
        except ValueError as error:
            raise ValueError(f"--radius_center=suggest: {name} at {layer}: {error}") from None

    def _warm_state(self):
        if self._warm is None:
            program = Program(methods.ERM, {}, self._settings, self._task)
            batches = self._task.train_batches(self._settings, self._seed)
            state, train_step = program.init(self._seed), program.stages[0][1]
            epochs = max(1, round(WARMUP * program.length.epochs))
            for step in range(epochs * program.length.steps_per_epoch):
                state, _ = train_step(state, batches[step])
                if parallel.must_block():
                    jax.block_until_ready(state)
            self._warm = jax.device_get(state)
        return self._warm
