"""What Linen and NNX modules cut at submodules share: everything but running the module."""

from collections.abc import Callable, Mapping

from lpa_jax.injection.base import (
    INPUT,
    LOGITS,
    Array,
    SubmoduleOutputs,
    Variables,
    check_layer,
    last_pinned,
    model_state,
    untapped,
)


class InjectedModule:
    """A module cut at the outputs of its submodules `paths`; a subclass says how one pass runs."""

    paths: tuple[str, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """`input`, the paths, `logits`."""
        return (INPUT, *self.paths, LOGITS)

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
        """Runs the module with pinned outputs exchanged; see `Network.advance`."""
        check_layer(self.layers, stop)
        state = model_state(variables)
        if last_pinned(self.layers, pinned, stop) == stop:
            return pinned[stop], state
        inputs = pinned.get(INPUT, inputs)
        if stop == INPUT:
            return inputs, state
        taps = {path: lambda _, value=value: value for path, value in pinned.items()}
        outputs = SubmoduleOutputs(self.paths, taps)
        logits, updated = self._pass(variables, inputs, outputs, train, rng)
        if stop == LOGITS:
            outputs.check_seen(set(pinned) - {INPUT, LOGITS})
            return logits, updated
        outputs.check_seen({stop})
        return outputs.seen[stop], state

    def walk(
        self,
        variables: Variables,
        inputs: Array,
        taps: Mapping[str, Callable[[Array], Array]],
        *,
        train: bool,
        rng: Array | None,
    ) -> tuple[Array, Variables]:
        """Runs the module once, taps in the middle of it; see `Network.walk`."""
        outputs = SubmoduleOutputs(self.paths, taps)
        inputs = taps.get(INPUT, untapped)(inputs)
        logits, state = self._pass(variables, inputs, outputs, train, rng)
        outputs.check_seen(set(taps) - {INPUT, LOGITS})
        return taps.get(LOGITS, untapped)(logits), state

    def _pass(
        self,
        variables: Variables,
        inputs: Array,
        outputs: SubmoduleOutputs,
        train: bool,
        rng: Array | None,
    ) -> tuple[Array, Variables]:
        """Runs the module with `outputs` listening: logits and new model state."""
        raise NotImplementedError
