"""Cutting any existing NNX module at named submodules, without editing it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import tracers

from lpa_jax.injection.base import Array, Pass, Variables, model_state
from lpa_jax.injection.calls import ModuleCall, module_call
from lpa_jax.injection.outputs import Keys, Outputs, listed
from lpa_jax.injection.submodules import InjectedModule, record_output
from lpa_jax.injection.train_switch import FIND, check_mode_property, find_switch, unknown_switch


@dataclasses.dataclass(frozen=True, eq=False)
class InjectedNNX(InjectedModule):
    """An NNX module cut at the outputs of some of its submodules; see `InjectedLinen`.

    The module itself does not change: every pass runs a copy, merged from its graph. In training it
    is in the mode of the cut, so that a BatchNorm built with `use_running_average=True` stays
    frozen. Random streams get new keys from the key of the pass, so that equal keys give equal
    dropout masks.

    Attributes:
      graphs: The module's graph in training and in evaluation mode.
      variables: Its parameters and state at the time of the cut.
      random_state: Its random streams at the time of the cut.
      paths: Paths of the submodules, in the order of the pass, `/`-separated.
      call: How the module is called.
      select: The part of an output that is cut, as (layer, keys) pairs.
    """

    graphs: Mapping[bool, nnx.GraphDef]
    variables: Variables
    random_state: nnx.State
    paths: tuple[str, ...]
    call: ModuleCall
    select: tuple[tuple[str, Keys], ...] = ()

    def init(self, rng: Array, inputs: Array) -> Variables:
        """The module's variables at the time of the cut: NNX modules initialise themselves."""
        del rng, inputs
        # Copies: a step that donates its state would delete the module's own arrays.
        return jax.tree.map(jnp.copy, dict(self.variables))

    def trace(self, given: Pass, outputs: Outputs, paths: Sequence[str]) -> tuple[Any, Variables]:
        """Runs a copy of the module; see `InjectedModule.trace`."""
        state, random_state = model_state(given.variables), self.random_state
        if given.rng is not None:
            random_state = _rekeyed(random_state, given.rng)
        # Copies: NNX refuses to write to variables from outside the current trace.
        graph, params = self.graphs[given.train], given.variables["params"]
        module = nnx.merge(graph, params, random_state, state["nnx"], copy=True)
        sown: dict[str, Any] = {kind: {} for kind in given.sown}
        for path, node in nnx.iter_graph(module):
            # Sown values would make the state grow. ToNNX takes all attributes for variables.
            if isinstance(node, nnx.Module) and not isinstance(node, nnx.bridge.ToNNX):
                object.__setattr__(node, "sow", _recording_sow(sown, path))
        for path in paths:
            record_output(_submodule(module, path), functools.partial(outputs.exchange, path))
        output = self.call(module, given)
        if not given.train:
            return output, {**state, **sown}
        _, _, _, updated = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return output, {"nnx": _as_before(updated, state["nnx"]), **sown}


def inject_nnx(
    module: nnx.Module, *paths: str, select: tuple[tuple[str, Keys], ...], **options: Any
) -> InjectedNNX:
    """See `lpa_jax.inject`."""
    graphs, parts = {}, ()
    for path in paths:
        _submodule(module, path)
    call = module_call(module, **options)
    _check_mode(module, call)
    for train in (True, False):
        copy = nnx.clone(module)
        # What earlier passes have sown is no state of the model.
        nnx.pop(copy, nnx.Intermediate, nnx.Perturbation)
        if not train:
            copy.eval()
        graphs[train], *parts = nnx.split(copy, nnx.Param, nnx.RngState, ...)
    params, random_state, rest = parts
    variables = {"params": params, "nnx": rest}
    return InjectedNNX(graphs, variables, random_state, paths, call, select)


def _check_mode(module: nnx.Module, call: ModuleCall) -> None:
    """Refuses a module whose training passes would fail or not be in training mode."""
    switch = call.switch
    for path, part in nnx.iter_graph(module):
        if not isinstance(part, nnx.Module):
            continue
        if switch.by_default:
            check_mode_property(part)
        if part is module:
            continue
        name = "/".join(map(str, path))
        if isinstance(part, nnx.Dropout) and part.deterministic and part.rate > 0:
            raise ValueError(
                f"module must be in training mode, got {name!r} with deterministic=True; "
                "call module.train() before the cut"
            )
        bare = isinstance(part, nnx.Dropout) and part.rate > 0 and part.rngs is None
        if bare and call.function is None:
            raise ValueError(
                f"module must have Dropout with rngs, got {name!r} without; or pass "
                "rngs=nnx.Rngs(**rngs) to it in a function `call`"
            )
        own = type(part).__module__.split(".")[0] != "flax"
        if own and not switch.known and find_switch(part, FIND, {}).name is not None:
            raise unknown_switch(module, f"{name!r} has one")


def _recording_sow(sown: Mapping[str, dict[str, Any]], path: Sequence[Any]) -> Callable[..., bool]:
    """`Module.sow` of the module at a path, for the kinds of variables in `sown`."""
    outside = tracers.current_trace()

    def sow(
        variable_type, name, value, reduce_fn=lambda values, value: (*values, value), init_fn=tuple
    ):
        kind = getattr(variable_type, "__name__", variable_type)
        if kind not in sown:
            return False
        if tracers.current_trace() != outside:
            raise ValueError(
                f"{name!r} must be sown outside of scan, vmap, remat and jit to be read"
            )
        values, key = sown[kind], "/".join(map(str, (*path, name)))
        values[key] = reduce_fn(values[key] if key in values else init_fn(), value)
        return True

    return sow


def _as_before(updated: nnx.State, before: nnx.State) -> nnx.State:
    """The entries of `updated` that were there `before`."""
    flat = dict(nnx.to_flat_state(updated))
    return nnx.from_flat_state({path: flat[path] for path, _ in nnx.to_flat_state(before)})


def _rekeyed(random_state: nnx.State, rng: Array) -> nnx.State:
    """The streams with keys folded from `rng` by position, and counts of zero."""

    def renew(position, leaf):
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros_like(leaf)
        key = jax.random.fold_in(rng, position)
        return jax.random.split(key, leaf.shape) if leaf.shape else key

    leaves, structure = jax.tree.flatten(random_state)
    return jax.tree.unflatten(structure, [renew(i, leaf) for i, leaf in enumerate(leaves)])


def _submodule(module: nnx.Module, path: str) -> nnx.Module:
    node = module
    try:
        for name in path.split("/"):
            node = node[int(name)] if name.isdigit() else getattr(node, name)
    except (AttributeError, IndexError, TypeError, KeyError):
        node = None
    if not (isinstance(node, nnx.Module) and callable(node)):
        raise ValueError(
            f"{type(module).__name__} has no callable submodule {path!r}; "
            f"it has: {listed(path, submodule_paths(module))}"
        )
    return node


def submodule_paths(module: nnx.Module) -> tuple[str, ...]:
    """Paths of all callable submodules of an NNX module."""
    return tuple(
        "/".join(map(str, path))
        for path, node in nnx.iter_graph(module)
        if path and isinstance(node, nnx.Module) and callable(node)
    )
