"""Cutting models that are written as a chain of stages (`lpa_jax.models`)."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax

from lpa_jax.injection.base import (
    INPUT,
    Array,
    Pass,
    Variables,
    check_layer,
    last_pinned,
    model_state,
    run_by_segments,
)


@dataclasses.dataclass(frozen=True)
class StagedNetwork:
    """A staged Linen model as a `Network`: every segment runs once, nothing is recomputed.

    Attributes:
      model: A Linen module with `layers` and
        `__call__(x, *, train, start, stop)`, see `lpa_jax.models.StagedModel`.
    """

    model: nn.Module

    @property
    def layers(self) -> tuple[str, ...]:
        """Injection points of the model."""
        return tuple(self.model.layers)

    def init(self, rng: Array, inputs: Array) -> Variables:
        """Initial variables; see `Network.init`."""
        params_rng, dropout_rng = jax.random.split(rng)
        # Under jit there is one compilation, not one for every initialiser.
        init = jax.jit(self.model.init, static_argnames="train")
        return init({"params": params_rng, "dropout": dropout_rng}, inputs, train=False)

    def run(self, given: Pass, pinned: Mapping[str, Array], stop: str) -> tuple[Array, Variables]:
        """Runs the stages between the deepest pinned layer and `stop`; see `Network.run`."""
        check_layer(self.layers, stop)
        start = last_pinned(self.layers, pinned, stop) or INPUT
        activation = pinned.get(start, given.inputs)
        state = model_state(given.variables)
        if start == stop:
            return activation, state
        arguments = {"train": given.train, "start": start, "stop": stop}
        rngs = None if given.rng is None else {"dropout": given.rng}
        if not (given.train and state):
            output = self.model.apply(given.variables, activation, rngs=rngs, **arguments)
            return output, state
        output, updated = self.model.apply(
            given.variables, activation, rngs=rngs, mutable=list(state), **arguments
        )
        return output, {**state, **updated}

    run_with_taps = run_by_segments
