"""A network given as two plain functions."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lpa_jax import checks
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

    Each function may take further keywords: `train`, the mode; `rng`, the key of the pass, None in
    evaluation; and `state`, in which case it returns its result and the new state, of which only
    that of a training pass is kept. Both functions get the same `rng`, and `decode` gets the state
    that `encode` has left.

    Attributes:
      encode: (params, inputs, ...) -> activation, or (activation, state).
      decode: (params, activation, ...) -> logits, or (logits, state).
      layer: Name of the injection point between them.
      init_params: (rng, inputs) -> params, or None if the caller has the parameters.
      init_state: (rng, inputs) -> state, any pytree of arrays; None without state.

    Raises:
      ValueError: `layer` is `input` or `logits`, or a state is made but not taken or the reverse.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> def encode(params, x, *, train, state):  # centres by a running mean
      ...     mean = jnp.where(train, 0.9 * state + 0.1 * x.mean(), state)
      ...     return (x - mean) * params, mean
      >>> network = CutFunctions(encode, lambda params, h: h, init_params=lambda rng, x: 2.0,
      ...                        init_state=lambda rng, x: jnp.zeros(()))
      >>> variables = network.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> _, state = network.run(Pass(variables, jnp.ones((2, 3)), train=True), {}, "logits")
      >>> round(float(state["state"]), 3)
      0.1
    """

    encode: Callable[..., Any]
    decode: Callable[..., Any]
    layer: str = "hidden"
    init_params: Callable[[Array, Any], Any] | None = None
    init_state: Callable[[Array, Any], Any] | None = None

    def __post_init__(self):
        """Refuses the names of the two ends of the chain."""
        checks.instance("layer", self.layer, str, "the name of the injection point")
        for name in ("encode", "decode"):
            checks.instance(name, getattr(self, name), Callable, "a function")
        if self.layer in (INPUT, LOGITS):
            raise ValueError(f"layer must not be input or logits, got {self.layer!r}")
        if self.init_state is not None and not any(
            "state" in _keywords(function) for function in (self.encode, self.decode)
        ):
            raise ValueError("encode or decode must take state with init_state, got neither")

    @property
    def layers(self) -> tuple[str, ...]:
        """`input`, the injection point, `logits`."""
        return (INPUT, self.layer, LOGITS)

    def init(self, rng: Array, inputs: Any) -> Variables:
        """Initial variables; see `Network.init`.

        Raises:
          ValueError: There is no `init_params`.
        """
        if self.init_params is None:
            raise ValueError("init_params is needed to initialise a network cut from functions")
        params = {"params": self.init_params(rng, inputs)}
        return (
            params if self.init_state is None else {**params, "state": self.init_state(rng, inputs)}
        )

    def run(self, given: Pass, pinned: Mapping[str, Array], stop: str) -> tuple[Array, Variables]:
        """Composes the two functions as needed; see `Network.run`."""
        check_layer(self.layers, stop)
        layer = last_pinned(self.layers, pinned, stop) or INPUT
        activation, state = pinned.get(layer, given.inputs), model_state(given.variables)
        chain = {INPUT: self.encode, self.layer: self.decode}
        while layer != stop:
            activation, state = _apply(chain[layer], activation, state, given)
            layer = self.layers[self.layers.index(layer) + 1]
        return activation, state if given.train else model_state(given.variables)

    run_with_taps = run_by_segments


def _apply(
    function: Callable[..., Any], activation: Any, state: Variables, given: Pass
) -> tuple[Array, Variables]:
    """The result of one of the functions, and the state after it."""
    names = _keywords(function)
    if "state" in names and "state" not in state:
        raise ValueError("init_state is needed for functions that take state, got None")
    known = {"train": given.train, "rng": given.rng, "state": state.get("state")}
    keywords = {name: value for name, value in known.items() if name in names}
    result = function(given.variables["params"], activation, **keywords)
    if "state" not in names:
        return result, state
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(
            f"a function that takes state must return (result, state), got {type(result).__name__}"
        )
    return result[0], {**state, "state": result[1]}


def _keywords(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the arguments of a function after its first two."""
    try:
        return tuple(inspect.signature(function).parameters)[2:]
    except ValueError:  # a function of C, such as a NumPy ufunc
        return ()
