"""Cutting models that are written as a chain of stages (`lpa_jax.models`)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax

from lpa_jax import checks, compiling
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
from lpa_jax.injection.linen_module import RECORDS, mutable_collections, sowing


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
        options = compiling.quick(rng, inputs)
        try:
            hash(self.model)
        except TypeError:  # a field is a list, for example
            init = functools.partial(_init, self.model)
            return jax.jit(init, compiler_options=options)(rng, inputs)
        return _compiled_init(options is not None)(self.model, rng, inputs)

    def run(self, given: Pass, pinned: Mapping[str, Array], stop: str) -> tuple[Array, Variables]:
        """Runs the stages between the deepest pinned layer and `stop`; see `Network.run`."""
        check_layer(self.layers, stop)
        start = last_pinned(self.layers, pinned, stop) or INPUT
        activation = pinned.get(start, given.inputs)
        state = model_state(given.variables)
        if start == stop:
            return activation, state
        checks.require(hasattr(activation, "shape"), "inputs", "one array", type(activation))
        arguments = {"train": given.train, "start": start, "stop": stop}
        rngs = None if given.rng is None else {"dropout": given.rng}
        mutable = mutable_collections(given)
        with nn.intercept_methods(sowing(given.sown)):
            result = self.model.apply(
                given.variables, activation, rngs=rngs, mutable=mutable, **arguments
            )
        output, updated = result if mutable else (result, {})
        return output, {**state, **updated}

    run_with_taps = run_by_segments


def _init(model: nn.Module, rng: Array, inputs: Array) -> Variables:
    params_rng, dropout_rng = jax.random.split(rng)
    rngs = {"params": params_rng, "dropout": dropout_rng}
    with nn.intercept_methods(sowing(())):
        return model.init(rngs, inputs, train=False, mutable=RECORDS)


@functools.cache
def _compiled_init(quick: bool) -> Callable[..., Variables]:
    """One compilation, not one for every initialiser; equal models share it."""
    return jax.jit(_init, static_argnums=0, compiler_options=compiling.QUICK if quick else None)
