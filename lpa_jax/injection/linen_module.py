"""Cutting any existing Linen module at named submodules, without editing it."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from lpa_jax.injection.base import Array, Pass, SubmoduleOutputs, Variables, model_state
from lpa_jax.injection.submodules import InjectedModule
from lpa_jax.injection.train_switch import FIND, Switch, find_switch, unknown_switch


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
      switch: What switches the module between training and evaluation.
      arguments: Further keyword arguments of `__call__`, as (name, value) pairs.
    """

    module: nn.Module
    paths: tuple[str, ...]
    switch: Switch
    arguments: tuple[tuple[str, Any], ...] = ()

    def _in_mode(self, train: bool) -> tuple[nn.Module, dict[str, Any]]:
        """The module and the keywords of its call in training or evaluation mode."""
        switched = self.switch.keywords(train)
        if self.switch.is_field:
            return self.module.clone(**switched), dict(self.arguments)
        return self.module, {**dict(self.arguments), **switched}

    def init(self, rng: Array, inputs: Array) -> Variables:
        """Initial variables; see `Network.init`."""
        params_rng, dropout_rng = jax.random.split(rng)
        rngs = {"params": params_rng, "dropout": dropout_rng}
        module, keywords = self._in_mode(train=False)
        return module.init(rngs, inputs, **keywords)

    def _pass(self, given: Pass, outputs: SubmoduleOutputs) -> tuple[Array, Variables]:
        """Runs the module, its outputs passing through `outputs`: logits and new model state."""
        state = model_state(given.variables)
        module, keywords = self._in_mode(given.train)

        def intercept(next_function, args, kwargs, context):
            if given.train and not self.switch.known and _depends_on_mode(context.module):
                raise unknown_switch(module, f"{type(context.module).__name__} depends on it")
            output = next_function(*args, **kwargs)
            path = "/".join(context.module.path)
            is_cut = context.method_name == "__call__" and path in self.paths
            return outputs.exchange(path, output) if is_cut and not outputs.tapping else output

        mutable = list(state) if given.train and state else False
        # Linen uses "params" for streams without a key of their own.
        rngs = None if given.rng is None else {"dropout": given.rng, "params": given.rng}
        with nn.intercept_methods(intercept):
            result = module.apply(
                given.variables, given.inputs, rngs=rngs, mutable=mutable, **keywords
            )
        logits, updated = result if mutable else (result, {})
        return logits, {**state, **updated}


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether a module of flax acts differently in training, such as Dropout and BatchNorm."""
    if getattr(module, "rate", getattr(module, "dropout_rate", None)) == 0:
        return False
    return hasattr(module, "deterministic") or hasattr(module, "use_running_average")


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
    train_argument: str | None = FIND,
    **arguments: Any,
) -> InjectedLinen:
    """See `lpa_jax.inject`."""
    switch = find_switch(module, train_argument, arguments)
    return InjectedLinen(module, paths, switch, tuple(sorted(arguments.items())))
