"""The base class of Linen and NNX modules that are cut at submodules."""

from collections.abc import Callable, Mapping

from lpa_jax.injection.base import (
    INPUT,
    LOGITS,
    Array,
    Pass,
    SubmoduleOutputs,
    Variables,
    check_layer,
    last_pinned,
    model_state,
    untapped,
)


class InjectedModule:
    """A module cut at the outputs of its submodules `paths`; a subclass runs a pass."""

    paths: tuple[str, ...]

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
        outputs = SubmoduleOutputs(self.paths, taps)
        logits, updated = self._pass(given, outputs)
        if stop == LOGITS:
            outputs.check_seen(set(pinned) - {INPUT, LOGITS})
            return logits, updated
        outputs.check_seen({stop})
        return outputs.seen[stop], state

    def run_with_taps(
        self, given: Pass, taps: Mapping[str, Callable[[Array], Array]]
    ) -> tuple[Array, Variables]:
        """Runs the module once, with the taps inside the pass; see `Network.run_with_taps`."""
        outputs = SubmoduleOutputs(self.paths, taps)
        inputs = taps.get(INPUT, untapped)(given.inputs)
        logits, state = self._pass(given._replace(inputs=inputs), outputs)
        outputs.check_seen(set(taps) - {INPUT, LOGITS})
        return taps.get(LOGITS, untapped)(logits), state

    def _pass(self, given: Pass, outputs: SubmoduleOutputs) -> tuple[Array, Variables]:
        """Runs the module, its outputs passing through `outputs`: logits and new model state."""
        raise NotImplementedError
