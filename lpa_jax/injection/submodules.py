"""The base class of Linen and NNX modules that are cut at submodules."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lpa_jax.injection.base import (
    INPUT,
    LOGITS,
    Array,
    Pass,
    Variables,
    check_layer,
    last_pinned,
    model_state,
    untapped,
)
from lpa_jax.injection.outputs import Keys, Outputs, SubmoduleOutputs


class InjectedModule:
    """A module cut at the outputs of its submodules `paths`; a subclass runs a pass."""

    paths: tuple[str, ...]
    select: tuple[tuple[str, Keys], ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """`input`, the paths, `logits`."""
        return (INPUT, *self.paths, LOGITS)

    def run(self, given: Pass, pinned: Mapping[str, Array], stop: str) -> tuple[Array, Variables]:
        """Runs the module with pinned outputs replaced; see `Network.run`."""
        check_layer(self.layers, stop)
        state = model_state(given.variables)
        if last_pinned(self.layers, pinned, stop) == stop:
            return pinned[stop], state
        given = given._replace(inputs=pinned.get(INPUT, given.inputs))
        if stop == INPUT:
            return given.inputs, state
        taps = {path: lambda _, value=value: value for path, value in pinned.items()}
        outputs, logits, updated = self._tapped(given, taps)
        if stop == LOGITS:
            outputs.check_seen(set(pinned) - {INPUT, LOGITS})
            return logits, updated
        outputs.check_seen({stop})
        return outputs.seen[stop], state

    def run_with_taps(
        self, given: Pass, taps: Mapping[str, Callable[[Array], Array]]
    ) -> tuple[Array, Variables]:
        """Runs the module once, with the taps inside the pass; see `Network.run_with_taps`."""
        inputs = taps.get(INPUT, untapped)(given.inputs)
        outputs, logits, state = self._tapped(given._replace(inputs=inputs), taps)
        outputs.check_seen(set(taps) - {INPUT, LOGITS})
        return taps.get(LOGITS, untapped)(logits), state

    def _tapped(
        self, given: Pass, taps: Mapping[str, Callable[[Array], Array]]
    ) -> tuple[SubmoduleOutputs, Array, Variables]:
        """One pass with taps at submodules: their outputs, the logits and the new model state."""
        outputs = SubmoduleOutputs(self.paths, taps, dict(self.select), given.inputs)
        output, state = self.trace(given, outputs, self.paths)
        return outputs, outputs.logits(output), state

    def trace(self, given: Pass, outputs: Outputs, paths: Sequence[str]) -> tuple[Any, Variables]:
        """Runs the module; `outputs.exchange` replaces the outputs of the submodules `paths`.

        Linen modules report their other submodules, too.

        Returns:
          What the module returns, and the new model state.
        """
        raise NotImplementedError


def record_output(module: Any, record: Callable[[Any], Any]) -> None:
    """Makes this instance, and no other one of its class, pass its output through `record`."""
    object.__setattr__(module, "__class__", _recording_class(type(module)))
    object.__setattr__(module, "_pytree__record_output", record)


@functools.cache
def _recording_class(cls: type) -> type:
    def call(self, *arguments, **keywords):
        return self._pytree__record_output(cls.__call__(self, *arguments, **keywords))

    call.method_handler_wrapped = True  # Linen must not intercept it
    return type(cls)(cls.__name__, (cls,), {"__call__": call, "__doc__": cls.__doc__})
