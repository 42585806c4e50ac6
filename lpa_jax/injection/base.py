"""A network as a chain of named layers that can be cut at each.

    x = input -> h_1 -> h_2 -> ... -> logits

Three kinds of network have this interface: staged models, which are made to be cut (`staged.py`);
any Linen or NNX module, cut by replacing the output of one of its submodules (`linen_module.py`,
`nnx_module.py`); and a pair of plain functions (`functions.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from lpa_jax import checks

Array = jax.Array
Variables = Mapping[str, Any]
Tap = Callable[[Array, Callable[[Array], Array]], Array]

INPUT = "input"
LOGITS = "logits"


class Pass(NamedTuple):
    """The inputs of a pass through a network.

    Attributes:
      variables: Parameters and model state.
      inputs: The network's input, [B, ...].
      train: Training mode (batch statistics, dropout) or evaluation mode.
      rng: Key for dropout in training mode. The same key gives the same masks, whatever is pinned
        and wherever the pass stops.
      sown: Names of collections of sown values (of NNX modules: of the classes of their variables)
        that the model state returned by the pass has as well. All others are dropped.
    """

    variables: Variables
    inputs: Array
    train: bool = False
    rng: Array | None = None
    sown: tuple[str, ...] = ()


@runtime_checkable
class Network(Protocol):
    """A network that can be cut at any of its `layers`.

    Variables are a mapping with the trained parameters under `"params"`; every other entry is model
    state (running statistics, for example) that a training pass replaces.
    """

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the injection points in order, from `input` to `logits`."""
        ...

    def init(self, rng: Array, inputs: Array) -> Variables:
        """Initial variables for a batch of inputs."""
        ...

    def run(self, given: Pass, pinned: Mapping[str, Array], stop: str) -> tuple[Array, Variables]:
        """Computes the activation at `stop`, with the activations at earlier layers replaced.

        Args:
          given: Variables, inputs, mode and key.
          pinned: Activations that replace the network's own at layers up to `stop`.
          stop: The layer to run to.

        Returns:
          The activation at `stop`, and the model state (everything but `"params"`), where the
          statistics of a layer are updated once as `stop` passes over it.
        """
        ...

    def run_with_taps(
        self, given: Pass, taps: Mapping[str, Callable[[Array], Array]]
    ) -> tuple[Array, Variables]:
        """Runs to the logits; the activation at every tapped layer is replaced by its tap's result.

        Nothing is computed twice: a tap is called in the middle of the pass, with the activation
        that the taps below have led to.

        Args:
          given: Variables, inputs, mode and key.
          taps: Layer -> function from its activation to the one that replaces it.

        Returns:
          The logits and the new model state.
        """
        ...


def check_layer(layers: Sequence[str], layer: str) -> None:
    """Raises ValueError, listing the names, unless `layer` is one of `layers`."""
    if layer not in layers:
        known = ", ".join(layers) + checks.nearest(layer, layers)
        raise ValueError(f"unknown layer {layer!r}; the injection points are: {known}")


def model_state(variables: Variables) -> dict[str, Any]:
    """Everything in `variables` but the parameters."""
    check_variables(variables)
    return {name: value for name, value in variables.items() if name != "params"}


def check_variables(variables: Variables) -> None:
    """Raises ValueError unless these are variables with their parameters under `params`."""
    fits = isinstance(variables, Mapping) and ("params" in variables or not variables)
    got = list(variables) if isinstance(variables, Mapping) else type(variables).__name__
    checks.require(fits, "variables", "a dictionary {'params': ..., ...} as from init", got)


def last_pinned(layers: Sequence[str], pinned: Mapping[str, Array], stop: str) -> str | None:
    """The deepest pinned layer at or before `stop`, or None."""
    upto = layers[: layers.index(stop) + 1]
    return next((layer for layer in reversed(upto) if layer in pinned), None)


def run_perturbed(
    network: Network, given: Pass, taps: Mapping[str, Tap]
) -> tuple[Array, Variables]:
    """One pass through the network; each tap replaces the activation at its layer.

    A tap is called as `tap(activation, decode)`. `decode` runs the network above that layer, with
    the taps below in force and those above not; it leaves the model state alone, and no gradient
    reaches the parameters through it. `decode(activation, chosen)` runs it for the examples at the
    positions `chosen` [M] alone.

    Args:
      network: A cut network.
      given: Variables, inputs, mode and key.
      taps: Layer -> tap.

    Returns:
      The logits and the new model state.

    Raises:
      ValueError: An unknown layer.
    """
    for layer in taps:
        check_layer(network.layers, layer)
    check_variables(given.variables)
    frozen = given._replace(variables=jax.lax.stop_gradient(dict(given.variables)), sown=())
    pinned: dict[str, Array] = {}

    def tap_at(layer):
        def tap(activation):
            whole = frozen.inputs, jax.lax.stop_gradient(dict(pinned))

            def decode(activation, chosen=None):
                inputs, below = whole
                if chosen is not None:
                    inputs, below = jax.tree.map(lambda values: values[chosen], whole)
                given = frozen._replace(inputs=inputs)
                return network.run(given, {**below, layer: activation}, LOGITS)[0]

            pinned[layer] = taps[layer](activation, decode)
            return pinned[layer]

        return tap

    return network.run_with_taps(given, {layer: tap_at(layer) for layer in taps})


def run_by_segments(
    network: Network, given: Pass, taps: Mapping[str, Callable[[Array], Array]]
) -> tuple[Array, Variables]:
    """`Network.run_with_taps` for networks whose `run` computes no more than it is asked for."""
    state = model_state(given.variables)
    pinned: dict[str, Array] = {}

    def run(stop):
        variables = {"params": given.variables["params"], **state}
        return network.run(given._replace(variables=variables), pinned, stop)

    for layer in (name for name in network.layers if name in taps):
        activation, state = run(layer)
        pinned[layer] = taps[layer](activation)
    return run(LOGITS) if LOGITS not in pinned else (pinned[LOGITS], state)


def untapped(activation: Array) -> Array:
    """A tap that changes nothing."""
    return activation


def activation_shapes(
    network: Network, variables: Variables, inputs: Any, layers: Sequence[str]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Layer -> shape of its activation for a batch like `inputs`, without computing it.

    Raises:
      ValueError: An unknown layer, or inputs of several arrays where one is asked for.
    """
    check_variables(variables)
    for layer in layers:
        check_layer(network.layers, layer)
    if INPUT in layers and not hasattr(inputs, "shape"):
        raise ValueError(
            "layer 'input' must be one array to be perturbed, got inputs of type "
            f"{type(inputs).__name__}: perturb a later layer"
        )

    def activations(variables, inputs):
        seen = {}

        def tap_at(layer):
            return lambda activation: seen.setdefault(layer, activation)

        network.run_with_taps(Pass(variables, inputs), {layer: tap_at(layer) for layer in layers})
        return seen

    return jax.eval_shape(activations, variables, inputs) if layers else {}
