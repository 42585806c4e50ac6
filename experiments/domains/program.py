"""A method compiled for training on several domains: once, whichever domains and numbers."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from experiments.domains.settings import DomainSettings, DomainSource
from experiments.methods.build import Mixed, assemble, mixed, traceable
from experiments.methods.names import MIXUP, POSTHOC, loss_names, parse, part_options
from experiments.training import traced_step
from lpa_jax import losses, metrics, optimizers, parallel, penalties
from lpa_jax.injection import as_network
from lpa_jax.training import loop as trainer
from lpa_jax.training.step import TrainState, eval_step


class Program:
    """A method for a number of training domains, compiled once.

    The method's numbers (radii, rates, the learning rate) are arguments of the compiled steps, so
    that all draws and all held-out domains share them; what else the options say is compiled in.

    Args:
      method: its name.
      options: its options; other programs' numbers may differ from them, nothing else.
      settings: settings of the run.
      source: the domains.
      num_domains: D, how many are trained on.
      counts: training images of each class, for what depends on them (`needs_counts`).
      layer: where perturbations without a layer of their own stand.

    Raises:
      ValueError: naming the flag or option that does not fit.
    """

    def __init__(
        self,
        method: str,
        options: Mapping[str, Any],
        settings: DomainSettings,
        source: DomainSource,
        num_domains: int,
        counts: Sequence[int],
        layer: str | None = None,
    ):
        settings = settings.with_options(options)
        _check_domains(method, settings, num_domains, len(source.names))
        self._method, self._settings, self._options = method, settings, dict(options)
        self._num_domains, self._counts, self._layer = num_domains, counts, layer
        model = settings.network(source.num_classes)
        self._transform = settings.transform(source.image_shape)
        self._loaded = settings.initial_variables(model, source.image_shape)
        examples = num_domains * settings.batch_size
        self._network = as_network(settings.over_devices(model, examples))
        self._normalize = source.normalization.apply
        shape = (examples, *source.image_shape)
        self._example = {"image": np.zeros(shape, np.float32)}
        known = self._mix(options)
        self._stages = tuple(
            (
                first,
                parallel.map_step(functools.partial(self._train_step, stage), donate_state=True),
            )
            for stage, (first, _) in enumerate(known.loss_stages)
        )
        self._evaluate = parallel.map_step(self._evaluate_step)
        # No number has a part in the first state: one compilation does for all.
        self._create = jax.jit(functools.partial(self._created, known))
        # Refuses layers that do not fit before anything is written or compiled.
        jax.eval_shape(self._create, jax.random.key(0), self._loaded)

    def check(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError, naming the option, where a number is out of range."""
        self._mix(options)

    def init(self, seed: int) -> TrainState:
        """The state before the first step, whose memory the steps may take."""
        # jit may pass the loaded weights through, and later trainings need theirs.
        return parallel.with_own_buffers(self._create(jax.random.key(seed), self._loaded))

    def place(self, batch: Mapping[str, Any]) -> parallel.PlacedBatch:
        """What the steps take, made ahead: the batch on its way to the devices."""
        return self._evaluate.place(batch)

    def _created(
        self, known: Mixed, rng: jax.Array, loaded: Mapping[str, Any] | None
    ) -> TrainState:
        return TrainState.create(
            self._network,
            # Static in the compiled steps, which bring an optimizer with their numbers.
            known.optimizer,
            rng,
            self._example,
            known.parts.perturbations,
            known.parts.penalties,
            loaded,
        )

    def stages(self, options: Mapping[str, Any]) -> tuple[tuple[int, trainer.Step], ...]:
        """(First interval, step) pairs."""
        numbers = self._numbers(options)
        return tuple(
            (first, traced_step.with_numbers(mapped, numbers)) for first, mapped in self._stages
        )

    def evaluation(self, options: Mapping[str, Any]) -> Callable[..., metrics.Pair]:
        """(state, batch) -> accuracy, as a pair."""
        numbers = self._numbers(options)
        return lambda state, batch: self._evaluate((state, numbers), batch)

    def _numbers(self, options: Mapping[str, Any]) -> dict[str, np.float32]:
        # Of the host: arrays on a device would be donated with the state by the first step.
        return {name: np.float32(options[name]) for name in traceable(self._method, options)}

    def _mix(self, options: Mapping[str, Any]) -> Mixed:
        settings = self._settings
        parts = assemble(
            self._method,
            options,
            layers=self._network.layers,
            layer=self._layer,
            counts=self._counts,
            epochs=settings.intervals,
            total_steps=settings.train_steps,
            num_domains=self._num_domains,
            head=settings.head,
        )
        rate = _rate(settings, options)
        return mixed(parts, settings, options, rate, ((0, losses.cross_entropy),))

    def _train_step(self, stage, state_and_numbers, batch, axis_name=None):
        return traced_step.train(
            state_and_numbers,
            batch,
            self._mix(self._options | state_and_numbers[1]),
            stage,
            augment=lambda *of: self._normalize(self._transform(*of)),
            axis_name=axis_name,
        )

    def _evaluate_step(self, state_and_numbers, batch, axis_name=None):
        state, numbers = state_and_numbers
        adjust = self._mix(self._options | numbers).parts.adjust_logits
        batch = {**batch, "image": self._normalize(batch["image"])}
        pairs = eval_step(state, batch, adjust_logits=adjust, axis_name=axis_name)
        return pairs["accuracy"]


def _check_domains(
    method: str, settings: DomainSettings, num_domains: int, num_sources: int
) -> None:
    compared = [p.name for p in parse(method) if p.name in penalties.names()
                and "num_domains" in penalties.options(p.name)]  # fmt: skip
    # Pairs of three domains leave one, on which such methods are trained as in DomainBed.
    if compared and num_domains < 2 and num_sources < 3:
        raise ValueError(
            f"--methods: {compared[0]} in {method!r} compares training domains, but only "
            f"{num_domains} of {settings.dataset} would be trained on"
        )
    if settings.batch_size % jax.device_count() and MIXUP in {part.name for part in parse(method)}:
        raise ValueError(
            f"--methods: mixup mixes domains, so that --batch_size={settings.batch_size} must be a "
            f"multiple of {jax.device_count()} devices"
        )
    if num_domains < 1:
        raise ValueError(f"--leave_two_out: {settings.dataset} has no third domain to train on")


def _rate(settings: DomainSettings, options: Mapping[str, Any]) -> optax.Schedule:
    return optimizers.schedule(
        settings.schedule,
        options.get("learning_rate", settings.learning_rate),
        total_steps=settings.train_steps,
    )


def needs_counts(method: str, options: Mapping[str, Any]) -> bool:
    """Whether class sizes, which differ between held-out domains, are compiled into the program.

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
