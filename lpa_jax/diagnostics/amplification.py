r"""How a perturbation injected at one layer grows up to the logits.

    gain_{l->m}(delta) = ||h_m(h_l + delta) - h_m(h_l)|| / ||delta||,

and its local bound, the largest singular value of the Jacobian dh_m/dh_l. The gain of a vanishing
delta does not exceed the bound; the gain of a finite delta may, if the network is not linear. Both
are per example and in evaluation mode, in which examples do not interact.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lpa_jax import checks, tables
from lpa_jax.checks import is_known
from lpa_jax.injection import Network, Pass, Variables, as_network, check_layer

Array = jax.Array


def layers_above(network: Network, layer: str) -> tuple[str, ...]:
    """Names of the injection points after `layer`, in order.

    Raises:
      ValueError: Unknown `layer`.

    Example:
      >>> from lpa_jax.injection import CutFunctions
      >>> layers_above(CutFunctions(lambda p, x: x, lambda p, h: h), "input")
      ('hidden', 'logits')
    """
    network = as_network(network)
    check_layer(network.layers, layer)
    return tuple(network.layers[network.layers.index(layer) + 1 :])


def random_directions(rng: Array, delta: Array) -> Array:
    """Directions drawn uniformly from the sphere, each with the norm of the same row of `delta`.

    Args:
      rng: A key.
      delta: [B, *S].

    Returns:
      [B, *S], in at least float32.

    Example:
      >>> delta = jnp.array([[3.0, 4.0], [0.0, 0.0]])
      >>> tables.row_norms(random_directions(jax.random.key(0), delta)).round(4).tolist()
      [5.0, 0.0]
    """
    checks.key("rng", rng)
    delta = jnp.asarray(delta)
    normal = jax.random.normal(rng, delta.shape, tables.perturbation_dtype(delta))
    return tables.over_classes(tables.row_norms(delta), normal) * tables.unit_rows(normal)


def gains(
    network: Network, variables: Variables, inputs: Array, layer: str, delta: Array
) -> dict[str, Array]:
    r"""Gain of a perturbation injected at `layer` at every later layer.

        gain_m[i] = ||h_m(h_i + delta_i) - h_m(h_i)|| / ||delta_i||

    Two forward passes for all layers together. Pure, so it can be compiled.

    Args:
      network: A cut network.
      variables: Its parameters and model state.
      inputs: [B, ...].
      layer: The injection point l.
      delta: [B, *S]: LPA's or another method's (`observe(...)[layer].delta`), or random directions
        of the same norms (`random_directions`).

    Returns:
      later layer -> gains [B], nan where delta_i is zero (average with
      `metrics.mean(gain, jnp.isfinite(gain))`).

    Raises:
      ValueError: Unknown `layer`, no example, a delta of another shape than the activation there,
        or (outside jit) a delta or an activation that is not finite, with or without delta.

    Example:
      >>> from lpa_jax.injection import CutFunctions
      >>> network = CutFunctions(lambda p, x: 3 * x, lambda p, h: 2 * h)
      >>> found = gains(network, {"params": ()}, jnp.ones((1, 4)), "input", jnp.ones((1, 4)))
      >>> {name: gain.tolist() for name, gain in found.items()}
      {'hidden': [3.0], 'logits': [6.0]}
    """
    network = as_network(network)
    above = layers_above(network, layer)
    if not len(inputs):
        raise ValueError("inputs must hold at least one example, got none")
    delta = jnp.asarray(delta)
    _check_finite("delta", delta)
    lengths = tables.row_norms(tables.at_least_float32(delta))

    def displaced(activation):
        if activation.shape != delta.shape:
            raise ValueError(
                f"delta must have the shape {activation.shape} of the activation at {layer!r}, "
                f"got {delta.shape}"
            )
        wide = tables.at_least_float32(activation) + delta
        return wide.astype(activation.dtype)

    before = _recorded(network, variables, inputs, {}, (layer, *above))
    after = _recorded(network, variables, inputs, {layer: displaced}, above)
    _check_finite(f"the activation at {layer!r}", before[layer])
    found = {}
    for m in above:
        _check_finite(f"the activation at {m!r}", before[m])
        _check_finite(f"the perturbed activation at {m!r}", after[m])
        moved = tables.row_norms(after[m] - before[m])
        found[m] = jnp.where(lengths > 0, moved / jnp.where(lengths > 0, lengths, 1.0), jnp.nan)
    return found


def _check_finite(name: str, values: Array) -> None:
    # NumPy's view of them, since jnp would stage the test where jit traces other arguments.
    if is_known(values) and not np.isfinite(np.asarray(values)).all():
        raise ValueError(f"{name} is not finite")


class LocalBound(NamedTuple):
    """Largest singular values of the Jacobian between two layers.

    Attributes:
      sigma: [B], the power iteration's estimate, which approaches the truth from below.
      relative_change: [B], |sigma_t - sigma_{t-1}| / sigma_t in the last iteration.
      iterations: Number of iterations run.
    """

    sigma: np.ndarray
    relative_change: np.ndarray
    iterations: int


def local_bound(
    network: Network,
    variables: Variables,
    inputs: Array,
    layer: str,
    target: str,
    *,
    rng: Array,
    tolerance: float = 1e-3,
    iterations: int = 100,
) -> LocalBound:
    r"""Largest singular value of J_i = dh_m/dh_l at every example, by power iteration.

        u = J v,    sigma = ||u||,    v <- J^T u / ||J^T u||,    from a random unit v.

    The Jacobian of the batch is block diagonal, one block J_i for each example, so that one jvp and
    one vjp advance the iterations of all examples together. It stops when no sigma changes by more
    than a relative `tolerance` in one iteration. Up to rounding, sigma_t never exceeds the true
    value and never decreases; its error shrinks by (sigma_2/sigma_1)^4 per iteration.

    Args:
      network: A cut network, hashable (as all of `lpa_jax.injection` are).
      variables: Its parameters and model state.
      inputs: [B, ...].
      layer: The lower layer l.
      target: The upper layer m, after `layer`.
      rng: Key for the first direction.
      tolerance: Relative change at which it stops, > 0.
      iterations: Maximum number of iterations, >= 1. The host loops; each is one compiled call.

    Raises:
      ValueError: Unknown layer, a `target` not above `layer`, an empty batch, a value out of range,
        or an activation or a Jacobian that is not finite.

    Example:
      >>> from lpa_jax.injection import CutFunctions
      >>> network = CutFunctions(lambda p, x: x @ p, lambda p, h: h)
      >>> params = {"params": jnp.diag(jnp.array([3.0, 1.0]))}
      >>> bound = local_bound(network, params, jnp.ones((2, 2)), "input", "hidden",
      ...                     rng=jax.random.key(0), tolerance=1e-6)
      >>> bound.sigma.round(4).tolist()
      [3.0, 3.0]
    """
    network = as_network(network)
    checks.key("rng", rng)
    if target not in layers_above(network, layer):
        check_layer(network.layers, target)
        raise ValueError(f"target must be a layer above {layer!r}, got {target!r}")
    checks.integer("iterations", iterations, minimum=1)
    checks.number("tolerance", tolerance, open_low=True)
    if not len(inputs):
        raise ValueError("inputs must hold at least one example, got none")
    activation = _activation(network, variables, inputs, layer)
    if not jnp.issubdtype(activation.dtype, jnp.floating):
        raise ValueError(
            f"only a floating activation has a Jacobian, {layer!r} is {activation.dtype}"
        )
    # The Jacobian of a network at nan is 0 after a rectifier.
    _check_finite(f"the activation at {layer!r}", activation)
    v = tables.unit_rows(jax.random.normal(rng, activation.shape, activation.dtype))
    sigma, change, done = np.zeros(len(inputs)), np.full(len(inputs), np.inf), 0
    while done < iterations and np.any(change > tolerance):
        found, v = _power_step(network, variables, inputs, layer, target, activation, v)
        previous, sigma = sigma, np.asarray(found, np.float64)
        if not np.isfinite(sigma).all():
            raise ValueError(f"the Jacobian from {layer!r} to {target!r} is not finite")
        change = np.abs(sigma - previous) / np.where(sigma > 0, sigma, 1.0)
        done += 1
    return LocalBound(sigma, change, done)


@partial(jax.jit, static_argnames=("network", "layer"))
def _activation(network, variables, inputs, layer):
    return network.run(Pass(variables, inputs), {}, layer)[0]


@partial(jax.jit, static_argnames=("network", "layer", "target"))
def _power_step(network, variables, inputs, layer, target, activation, v):
    def above(activation):
        return network.run(Pass(variables, inputs), {layer: activation}, target)[0]

    _, jacobian_v = jax.jvp(above, (activation,), (v,))
    _, transposed = jax.vjp(above, activation)
    # Unit rows before the transpose: sigma^2 could leave the range of a half-precision activation.
    sigma = tables.row_norms(tables.at_least_float32(jacobian_v))
    return sigma, tables.unit_rows(transposed(tables.unit_rows(jacobian_v))[0])


def _recorded(
    network: Network,
    variables: Variables,
    inputs: Array,
    taps: Mapping[str, object],
    layers: Sequence[str],
) -> dict[str, Array]:
    """Activations at `layers`, in at least float32, of one pass with `taps`."""
    seen = {}

    def recording(layer):
        def tap(activation):
            seen[layer] = tables.at_least_float32(activation)
            return activation

        return tap

    watched = {layer: recording(layer) for layer in layers}
    network.run_with_taps(Pass(variables, inputs), {**taps, **watched})
    return seen
