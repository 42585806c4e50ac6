"""How a module is called on a batch of inputs: by its own `__call__`, or by a function."""

import dataclasses
import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lpa_jax.injection.base import Array, Pass
from lpa_jax.injection.train_switch import FIND, Switch, find_switch

Call = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class ModuleCall:
    """A call of a module in training or evaluation mode.

    Attributes:
      switch: What switches a module that is called by its own `__call__`.
      arguments: Further keyword arguments of `__call__`, as (name, value) pairs.
      function: (module, inputs, train, **rngs) -> output, instead of `__call__`.
      streams: Random streams that the function names.
      takes_all: Whether the function has `**rngs`.
    """

    switch: Switch
    arguments: tuple[tuple[str, Any], ...] = ()
    function: Call | None = None
    streams: tuple[str, ...] = ()
    takes_all: bool = False

    def __call__(self, module: Any, given: Pass) -> Any:
        """What the module returns."""
        if self.function is None:
            switched = {} if self.switch.is_field else self.switch.keywords(given.train)
            return module(given.inputs, **{**dict(self.arguments), **switched})
        rngs = self.rngs(given)
        if not self.takes_all:
            rngs = {name: rngs[name] for name in self.streams}
        return self.function(module, given.inputs, given.train, **rngs)

    def rngs(self, given: Pass) -> dict[str, Array]:
        """The key of every stream: `dropout` in training, and always those that are named."""
        base = jax.random.key(0) if given.rng is None else given.rng
        names = (*self.streams, *(("dropout",) if given.rng is not None else ()))
        return {name: base if name == "dropout" else stream_key(base, name) for name in names}


def stream_key(rng: Array, name: str) -> Array:
    """The key of a random stream, different for every name."""
    return jax.random.fold_in(rng, zlib.crc32(name.encode()))


def module_call(
    module: Any, call: Call | None = None, train_argument: str | None = FIND, **arguments: Any
) -> ModuleCall:
    """The call that the options of `lpa_jax.inject` describe.

    Raises:
      ValueError: Options that the module does not take or that do not go together, or a training
        switch that cannot be determined.
    """
    if call is None:
        switch = find_switch(module, train_argument, arguments)
        switched = {} if switch.is_field else switch.keywords(True)
        try:
            inspect.signature(type(module).__call__).bind(module, None, **{**arguments, **switched})
        except TypeError as error:
            raise ValueError(
                f"call must be a function that calls {type(module).__name__}, which does not take "
                f"inputs alone ({error}), got none"
            ) from None
        return ModuleCall(switch, tuple(sorted(arguments.items())))
    further = [*arguments, *(["train_argument"] if train_argument != FIND else [])]
    if further:
        raise ValueError(f"call must be the only option about the call, got {further[0]!r} as well")
    streams, takes_all = _streams(call)
    return ModuleCall(Switch(None), (), call, streams, takes_all)


def _streams(call: Call) -> tuple[tuple[str, ...], bool]:
    """The random streams that a function (module, inputs, train, **rngs) names, and `**rngs`."""
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(call).parameters
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, _EITHER)]
    if len(positional) < 3 and not any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        raise ValueError(
            "call must be a function of (module, inputs, train, **rngs), "
            f"got one of ({', '.join(parameters)})"
        )
    named = [p.name for p in positional[3:]]
    named += [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    return tuple(named), any(p.kind is p.VAR_KEYWORD for p in parameters.values())


_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD
