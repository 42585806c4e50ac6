"""Cutting any existing Linen module at named submodules, without editing it."""

import dataclasses
import inspect
from typing import Any

import flax.linen as nn
import jax

from lpa_jax.injection.base import Array, Pass, SubmoduleOutputs, Variables, model_state
from lpa_jax.injection.submodules import InjectedModule

# Names that modules use for the switch between training and evaluation, and the value in training.
TRAIN_ARGUMENTS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


@dataclasses.dataclass(frozen=True)
class InjectedLinen(InjectedModule):
    """A Linen module cut at the outputs of some of its submodules.

    The training pass runs the module once and calls the taps inside it. Decoding runs the whole
    module with a submodule's output replaced; the result then does not depend on the layers below,
    and under jit XLA drops them. (One pass for the activation and another one for the rest would
    cost more: both need the batch statistics below, and XLA does not merge them, because it
    simplifies the one with a backward pass differently.)

    Attributes:
      module: The module, unchanged. Its `__call__` takes the input and returns logits.
      paths: Paths of the submodules, in the order of the pass, `/`-separated.
      train_argument: Keyword of `__call__` that switches training mode, or None if it has none.
      arguments: Further keyword arguments of `__call__`, as (name, value) pairs.
    """

    module: nn.Module
    paths: tuple[str, ...]
    train_argument: str | None
    arguments: tuple[tuple[str, Any], ...] = ()

    def _keywords(self, train: bool) -> dict[str, Any]:
        keywords = dict(self.arguments)
        if self.train_argument is not None:
            keywords[self.train_argument] = train == TRAIN_ARGUMENTS.get(self.train_argument, True)
        return keywords

    def init(self, rng: Array, inputs: Array) -> Variables:
        """Initial variables; see `Network.init`."""
        params_rng, dropout_rng = jax.random.split(rng)
        rngs = {"params": params_rng, "dropout": dropout_rng}
        return self.module.init(rngs, inputs, **self._keywords(train=False))

    def _pass(self, given: Pass, outputs: SubmoduleOutputs) -> tuple[Array, Variables]:
        """Runs the module, its outputs passing through `outputs`: logits and new model state."""
        state = model_state(given.variables)

        def intercept(next_function, args, kwargs, context):
            output = next_function(*args, **kwargs)
            path = "/".join(context.module.path)
            is_cut = context.method_name == "__call__" and path in self.paths
            return outputs.exchange(path, output) if is_cut and not outputs.tapping else output

        mutable = list(state) if given.train and state else False
        # Linen uses "params" for streams without a key of their own.
        rngs = None if given.rng is None else {"dropout": given.rng, "params": given.rng}
        with nn.intercept_methods(intercept):
            result = self.module.apply(
                given.variables,
                given.inputs,
                rngs=rngs,
                mutable=mutable,
                **self._keywords(given.train),
            )
        logits, updated = result if mutable else (result, {})
        return logits, {**state, **updated}


def submodule_paths(module: nn.Module, *arguments: Any, **keywords: Any) -> tuple[str, ...]:
    """Paths of all submodules called in a pass, in the order in which they return.

    Nothing is computed: the module is only traced.
    """
    returned: dict[str, None] = {}

    def record(next_function, args, kwargs, context):
        output = next_function(*args, **kwargs)
        if context.method_name == "__call__" and context.module.path:
            returned["/".join(context.module.path)] = None
        return output

    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    with nn.intercept_methods(record):
        jax.eval_shape(lambda *a: module.init(rngs, *a, **keywords), *arguments)
    return tuple(returned)


def inject_linen(
    module: nn.Module,
    *paths: str,
    train_argument: str | None = None,
    **arguments: Any,
) -> InjectedLinen:
    """See `lpa_jax.inject`."""
    parameters = inspect.signature(type(module).__call__).parameters
    if train_argument is None:
        train_argument = next((name for name in TRAIN_ARGUMENTS if name in parameters), None)
    elif train_argument not in parameters:
        raise ValueError(
            f"train_argument {train_argument!r} is not an argument of {type(module).__name__}; "
            f"it takes: {', '.join(name for name in parameters if name != 'self')}"
        )
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in arguments if name not in parameters and not takes_any]
    if unknown:
        raise ValueError(
            f"option {unknown[0]!r} is not an argument of {type(module).__name__}; "
            f"it takes: {', '.join(name for name in parameters if name != 'self')}"
        )
    return InjectedLinen(module, paths, train_argument, tuple(sorted(arguments.items())))
