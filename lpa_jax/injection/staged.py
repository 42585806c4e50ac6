"""Cutting models that are written as a chain of stages (`lpa_jax.models`)."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax

from lpa_jax.injection.base import (
    INPUT,
    Array,
    Variables,
    check_layer,
    last_pinned,
    model_state,
    walk_by_segments,
)


@dataclasses.dataclass(frozen=True)
class StagedNetwork:
    """A staged Linen model as a `Network`: every segment runs on its own, nothing is recomputed.

    Attributes:
      model: a Linen module with `layers` and
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
        # One compilation instead of one for every initialiser.
        init = jax.jit(self.model.init, static_argnames="train")
        return init({"params": params_rng, "dropout": dropout_rng}, inputs, train=False)

    def advance(
        self,
        variables: Variables,
        inputs: Array,
        pinned: Mapping[str, Array],
        stop: str,
        *,
        train: bool,
        rng: Array | None,
    ) -> tuple[Array, Variables]:
        """Runs the stages between the deepest pinned layer and `stop`; see `Network.advance`."""
        check_layer(self.layers, stop)
        start = last_pinned(self.layers, pinned, stop) or INPUT
        activation = pinned.get(start, inputs)
        state = model_state(variables)
        if start == stop:
            return activation, state
        arguments = {"train": train, "start": start, "stop": stop}
        rngs = None if rng is None else {"dropout": rng}
        if not (train and state):
            output = self.model.apply(variables, activation, rngs=rngs, **arguments)
            return output, state
        output, updated = self.model.apply(
            variables, activation, rngs=rngs, mutable=list(state), **arguments
        )
        return output, {**state, **updated}

    walk = walk_by_segments
