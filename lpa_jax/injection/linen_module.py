"""Cutting any existing Linen module at named submodules, without editing it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.core.scope import DenyList

from lpa_jax import compiling
from lpa_jax.injection.base import Array, Pass, Variables, model_state
from lpa_jax.injection.calls import ModuleCall, module_call, stream_key
from lpa_jax.injection.outputs import Keys, Outputs
from lpa_jax.injection.submodules import InjectedModule, record_output
from lpa_jax.injection.train_switch import Switch, check_mode_property, unknown_switch

# What a module records of one batch (`Module.sow`, `Module.perturb`) is no state of the model.
RECORDS = DenyList(("intermediates", "perturbations"))


@dataclasses.dataclass(frozen=True)
class InjectedLinen(InjectedModule):
    """A Linen module cut at the outputs of some of its submodules.

    The training pass runs the module once and calls the taps inside it. Decoding runs the whole
    module with a submodule's output replaced; the result then does not depend on the layers below,
    and under jit XLA drops them. (One pass for the activation and another one for the rest would
    cost more: both need the batch statistics below, and XLA does not merge them, because it
    simplifies the one with a backward pass differently.)

    Attributes:
      module: The module, unchanged.
      paths: Paths of the submodules, in the order of the pass, `/`-separated.
      call: How the module is called.
      select: The part of an output that is cut, as (layer, keys) pairs.
    """

    module: nn.Module
    paths: tuple[str, ...]
    call: ModuleCall
    select: tuple[tuple[str, Keys], ...] = ()

    def _in_mode(self, train: bool) -> nn.Module:
        """The module, switched if a field of it is the switch."""
        switch = self.call.switch
        return self.module.clone(**switch.keywords(train)) if switch.is_field else self.module

    def init(self, rng: Array, inputs: Any) -> Variables:
        """Initial variables; see `Network.init`."""
        params_rng, dropout_rng = jax.random.split(rng)
        given = Pass({}, inputs)
        rngs = {**self.call.rngs(given), "params": params_rng, "dropout": dropout_rng}

        def init(rngs, inputs):
            def run(module):
                return self.call(module, given._replace(inputs=inputs))

            with nn.intercept_methods(sowing(())):
                return self._in_mode(False).init(rngs, method=run, mutable=RECORDS)

        # One compilation, not one for every initialiser.
        options = compiling.quick(rngs, inputs)
        return jax.jit(init, compiler_options=options)(rngs, inputs)

    def trace(self, given: Pass, outputs: Outputs, paths: Sequence[str]) -> tuple[Any, Variables]:
        """Runs the module; see `InjectedModule.trace`."""
        del paths  # all are intercepted
        state, switch = model_state(given.variables), self.call.switch
        module = self._in_mode(given.train)
        lifted: set[str] = set()
        sow = sowing(given.sown)

        def record_lifted(path, child):
            lifted.add(path)
            record_output(child, functools.partial(outputs.exchange, path))

        def intercept(next_function, args, kwargs, context):
            if outputs.tapping:  # a pass of its own, with an interceptor of its own
                return next_function(*args, **kwargs)
            _for_lifted_children(context.module, record_lifted)
            if given.train and switch.name is None and _depends_on_mode(context.module):
                _check_mode(module, switch, context.module)
            output = sow(next_function, args, kwargs, context)
            path = "/".join(context.module.path)
            is_call = context.method_name == "__call__" and path and path not in lifted
            return outputs.exchange(path, output) if is_call else output

        mutable = mutable_collections(given)
        rngs = self.call.rngs(given)
        if given.rng is not None:  # Linen uses "params" for streams without a key of their own
            rngs["params"] = stream_key(given.rng, "params")
        with nn.intercept_methods(intercept):
            result = module.apply(
                given.variables,
                rngs=rngs or None,
                mutable=mutable,
                method=lambda module: self.call(module, given),
            )
        output, updated = result if mutable else (result, {})
        return output, {**state, **updated}


def sowing(kept: Sequence[str]) -> Callable[..., Any]:
    """An interceptor of Linen's methods, in which `Module.sow` fills no collections but those kept.

    A state with sown values would grow, and be compiled anew, at every step.
    """

    def intercept(next_function, args, kwargs, context):
        module = context.module

        def sow(col, *args, **kwargs):
            return col in kept and type(module).sow(module, col, *args, **kwargs)

        object.__setattr__(module, "sow", sow)
        return next_function(*args, **kwargs)

    return intercept


def mutable_collections(given: Pass) -> list[str] | bool:
    """The collections that a pass changes."""
    state = model_state(given.variables) if given.train else ()
    return [*state, *(name for name in given.sown if name not in state)] or False


class _Children(dict):
    """The children of a Linen module, which tells of every new one."""

    def __init__(self, children, tell):
        super().__init__(children)
        self._tell = tell
        for name, child in children.items():
            tell(name, child)

    def __setitem__(self, name, child):
        super().__setitem__(name, child)
        self._tell(name, child)


def _for_lifted_children(parent: nn.Module, do: Callable[[str, nn.Module], None]) -> None:
    """Calls `do(path, child)` for the children whose class is transformed (remat, jit, scan, vmap).

    An interceptor sees the calls of such a module only inside the transformation.
    """

    def tell(name, child):
        inner = getattr(type(child).__call__, "__wrapped__", None)
        if isinstance(child, nn.Module) and getattr(inner, "method_handler_wrapped", False):
            do("/".join((*parent.path, name)), child)

    if not isinstance(parent._state.children, _Children):
        parent._state.children = _Children(parent._state.children, tell)


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether a module of flax acts differently in training, such as Dropout and BatchNorm."""
    fields = module.__dataclass_fields__  # other attributes may be computed by intercepted methods
    rates = (getattr(module, name) for name in ("rate", "dropout_rate") if name in fields)
    if any(isinstance(rate, int | float) and rate == 0 for rate in rates):
        return False
    return "deterministic" in fields or "use_running_average" in fields


def _check_mode(module: nn.Module, switch: Switch, part: nn.Module) -> None:
    """Refuses a part that depends on the mode, where a module may have a switch that is unknown."""
    if not switch.known:
        raise unknown_switch(module, f"{type(part).__name__} depends on it")
    while switch.by_default and isinstance(part, nn.Module):
        check_mode_property(part)
        part = part.parent


def inject_linen(
    module: nn.Module, *paths: str, select: tuple[tuple[str, Keys], ...], **options: Any
) -> InjectedLinen:
    """See `lpa_jax.inject`."""
    return InjectedLinen(module, paths, module_call(module, **options), select)
