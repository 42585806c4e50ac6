"""The radius at which a perturbation changes the loss by a chosen amount, measured on one batch."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpa_jax import checks, injection
from lpa_jax.diagnostics.geometry import observe
from lpa_jax.labels import Labels, counted_labels
from lpa_jax.losses import cross_entropy
from lpa_jax.parallel.explicit_axes import in_auto_axes
from lpa_jax.perturbations import Perturbation, lpa
from lpa_jax.perturbations.radius_target import measured_change, sign_group_means
from lpa_jax.tables import BatchClasses

GROUPS = ("positive", "negative")

Array = jax.Array
_POINTS_PER_DECADE = 2


def suggest_radius(
    model: Any,
    variables: injection.Variables,
    batch: Mapping[str, Any],
    layer: str,
    *,
    target: float = 0.5,
    group: str = "positive",
    method: Callable[..., Perturbation] = lpa,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    rng: Array | None = None,
    low: float = 1e-4,
    high: float = 1e3,
    tolerance: float = 0.05,
    axis_name: str | None = None,
    **options: Any,
) -> float:
    r"""The radius at which the class-level loss change of a sign group has a chosen size.

    The same radius has different effects at different layers, models and augmentations; the loss
    change that it causes is comparable. With delta_c(r) the perturbation of class c at radius r,

        change(r) = mean over the group's classes in the batch of  s_c (J_c(delta_c(r)) - J_c(0)),

    and J_c the mean loss of the class's members: how much positive perturbation raises the loss, or
    negative lowers it. The search tries increasing radii, two per decade, until the change reaches
    the target, and then bisects the interval; if the change is not monotone in the radius, this
    gives the smallest radius on that grid. The network runs in training mode, in which the
    perturbation is applied. Everything is compiled once, with the radius as an argument.

    Use a trained or half-trained network: at initialisation all classes have the same loss, and the
    same change needs a far larger radius than later.

    Args:
      model: A staged model or a `Network`; `state.network` of a `TrainState`.
      variables: `{"params": ..., ...}`, which do not change; `state.variables` of a `TrainState`.
      batch: `{"image": [B, ...], "label": [B] integers}`; the more examples, the less noise in the
        result.
      layer: Injection point.
      target: Change wanted, in nats, > 0.
      group: `"positive"` (s_c = +1) or `"negative"` (s_c = -1), whose change cannot exceed its
        loss.
      method: Factory of a perturbation with signs: (radius, **options) -> Perturbation, such as
        `lpa` or `lpl`. Its radius is traced.
      loss: (logits [B, C], targets [B, C]) -> [B].
      rng: Key for dropout; `jax.random.key(0)` if None.
      low: Smallest radius tried.
      high: Largest radius tried.
      tolerance: Largest relative difference between the change and the target.
      axis_name: Mapped axis that the model reduces over, as in `BatchNorm(axis_name=...)`: here the
        batch is all of it. None for other models.
      **options: Options of `method`, for example `assignment=lpa_jax.by_frequency(counts)`,
        `steps`, `geometry`. `mode` must be `"cold"`, the default: the others start from a carried
        delta.

    Returns:
      The radius, to use in `method` with the same options.

    Raises:
      ValueError: An argument out of range; unknown layer; no class of the group in the batch; a
        loss that is not finite; a change above the target at `low`, below it up to `high`, or one
        that jumps over it.

    Example:
      >>> model = injection.CutFunctions(lambda p, x: x, lambda p, h: h @ p)  # logits = hidden
      >>> batch = {"image": jnp.eye(3), "label": jnp.arange(3)}
      >>> def linear_loss(logits, targets):  # of the true class alone: changes by the radius itself
      ...     return -jnp.sum(logits * targets, axis=-1)
      >>> from lpa_jax import all_positive
      >>> suggestion = suggest_radius(
      ...     model, {"params": jnp.eye(3)}, batch, "hidden", target=0.5, tolerance=0.01,
      ...     loss=linear_loss, assignment=all_positive(), geometry="free", scale="absolute")
      >>> abs(suggestion - 0.5) < 0.005
      True

    References:
      A choice of this library; the papers tune the radius.
    """
    network = injection.as_network(model)
    checks.instance("method", method, Callable, "a function that makes a perturbation, such as lpa")
    _check_arguments(target, group, low, high, tolerance, options)
    batch = injection.read_batch(network, batch)
    batch = {"image": jax.tree.map(jnp.asarray, batch["image"]), "label": counted_labels(batch)}
    labels = _checked_labels(network, variables, batch, layer)
    index = GROUPS.index(group)
    rng = jax.random.key(0) if rng is None else rng
    checks.key("rng", rng)

    def measured(variables, batch, radius):
        perturbations = {layer: method(radius, **options)}
        seen = observe(network, variables, batch, perturbations, rng=rng, loss=loss, train=True)
        before, after, sign = seen[layer].loss_before, seen[layer].loss_after, seen[layer].sign
        if sign is None:
            raise ValueError(
                f"method must give classes a sign, {perturbations[layer].name} does not"
            )
        rows = dataclasses.replace(labels, values=batch["label"]).rows
        classes = BatchClasses.of(rows, sign.shape[0])
        change, exists = measured_change(before, after, classes, sign)
        base, _ = sign_group_means(before, classes, sign)
        return change[index], base[index], exists[index], jnp.sum(classes.means(before))

    measure = jax.jit(in_auto_axes()(_on_one_device(measured, axis_name)))

    def change_at(radius):
        change = float(measure(variables, batch, np.float32(radius))[0])
        if not math.isfinite(change):
            raise ValueError(
                f"the loss must be finite, but changes by {change} at radius {radius:.3g}"
            )
        return change

    # The loss first: an assignment by confidence gives no sign to a class whose loss is NaN.
    _, base, exists, total = measure(variables, batch, np.float32(low))
    if not math.isfinite(total):
        raise ValueError(f"the loss must be finite, but is {float(total)} without perturbation")
    if not exists:
        raise ValueError(f"group={group!r} has no class in the batch")
    lower, upper = _bracket(change_at, target, low, high, tolerance, float(base))
    return _bisect(change_at, target, lower, upper, tolerance)


def _on_one_device(measured, axis_name):
    """The function with a mapped axis of size 1."""
    if axis_name is None:
        return measured
    mapped = jax.vmap(measured, (None, 0, None), axis_name=axis_name)

    def call(variables, batch, radius):
        found = mapped(variables, jax.tree.map(lambda values: values[None], batch), radius)
        return jax.tree.map(lambda values: values[0], found)

    return call


def _bracket(change_at, target, low, high, tolerance, base) -> tuple[float, float]:
    """Neighbours on a logarithmic grid, between which the change first reaches the target."""
    points = 1 + math.ceil(_POINTS_PER_DECADE * math.log10(high / low))
    lower, largest = low, (-math.inf, low)
    for radius in np.geomspace(low, high, points).tolist():
        change = change_at(radius)
        if radius == low and change > target * (1 + tolerance):
            raise ValueError(f"low={low:g} must be smaller: the loss changes by {change:.3g} there")
        if change >= target:
            return lower, radius
        lower, largest = radius, max(largest, (change, radius))
    raise ValueError(
        f"target={target:g} is not reached up to high={high:g}: the loss, {base:.3g} unperturbed, "
        f"changes by {largest[0]:.3g} at most, at radius {largest[1]:.3g}"
    )


def _bisect(change_at, target, lower, upper, tolerance) -> float:
    """A radius in between where the change is the target within the tolerance."""
    change, radius = change_at(upper), upper
    while abs(change - target) > tolerance * target:
        if upper / lower < 1 + 1e-5:
            raise ValueError(
                f"target={target:g} is not reached: the change of the loss jumps over it, "
                f"to {change_at(upper):.3g}, at radius {upper:.3g}"
            )
        radius = math.sqrt(lower * upper)
        change = change_at(radius)
        if change < target:
            lower = radius
        else:
            upper = radius
    return radius


def _check_arguments(target, group, low, high, tolerance, options) -> None:
    for name, value in (("target", target), ("low", low), ("high", high), ("tolerance", tolerance)):
        checks.number(name, value, open_low=True)
    checks.require(low < high, "low", f"smaller than high={high:g}", low)
    checks.choice("group", group, GROUPS)
    mode = options.get("mode", "cold")
    checks.require(mode == "cold", "mode", "'cold' to suggest a radius", mode)


def _checked_labels(network, variables, batch, layer) -> Labels:
    injection.check_layer(network.layers, layer)
    if not batch["label"].size:
        raise ValueError("batch must hold at least one example, got none")
    shapes = injection.activation_shapes(network, variables, batch["image"], [injection.LOGITS])
    return Labels.of(batch, shapes[injection.LOGITS])
