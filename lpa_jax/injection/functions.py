"""A network given as two plain functions."""

import dataclasses
from collections.abc import Callable, Mapping
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
    run_by_segments,
)


@dataclasses.dataclass(frozen=True)
class CutFunctions:
    """Two functions, below and above one injection point, as a `Network`.

    Attributes:
      encode: (params, inputs) -> activation.
      decode: (params, activation) -> logits.
      layer: Name of the injection point between them.
      init_params: (rng, inputs) -> params, or None if the caller has the parameters.

    Raises:
      ValueError: `layer` is `input` or `logits`.
    """

    encode: Callable[[Any, Array], Array]
    decode: Callable[[Any, Array], Array]
    layer: str = "hidden"
    init_params: Callable[[Array, Array], Any] | None = None

    def __post_init__(self):
        """Refuses the names of the two ends of the chain."""
        if self.layer in (INPUT, LOGITS):
            raise ValueError(f"layer must not be input or logits, got {self.layer!r}")

    @property
    def layers(self) -> tuple[str, ...]:
        """`input`, the injection point, `logits`."""
        return (INPUT, self.layer, LOGITS)

    def init(self, rng: Array, inputs: Array) -> Variables:
        """Initial variables; see `Network.init`.

        Raises:
          ValueError: There is no `init_params`.
        """
        if self.init_params is None:
            raise ValueError("init_params is needed to initialise a network cut from functions")
        return {"params": self.init_params(rng, inputs)}

    def run(self, given: Pass, pinned: Mapping[str, Array], stop: str) -> tuple[Array, Variables]:
        """Composes the two functions as needed; see `Network.run`."""
        check_layer(self.layers, stop)
        layer = last_pinned(self.layers, pinned, stop) or INPUT
        activation = pinned.get(layer, given.inputs)
        chain = {INPUT: self.encode, self.layer: self.decode}
        while layer != stop:
            activation = chain[layer](given.variables["params"], activation)
            layer = self.layers[self.layers.index(layer) + 1]
        return activation, model_state(given.variables)

    run_with_taps = run_by_segments
