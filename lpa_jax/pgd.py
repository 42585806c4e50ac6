r"""Class-level projected gradient ascent on an activation: the core of LPA.

For a batch of activations h_i with labels y_i, every class c present in the global batch gets one
perturbation

    delta_c  <-  Proj_{K_c}( delta_c + s_c * eta_c * grad J_c / ||grad J_c|| ),
    J_c(delta) = (1/n_c) sum_{i : y_i = c} loss(h_i + delta),
    K_c        = { delta : ||delta|| <= eps_c  and  s_c cos(delta, hbar_c) >= min_cosine },

where hbar_c is the class-mean activation, s_c in {-1, 0, +1} the sign and eps_c the radius; with
min_cosine = 0, the default, K_c is a half ball. That the perturbation belongs to a class, is found
by PGD and is expansive or contractive comes from the LPA abstract (arXiv 2605.29525); the cone in
K_c, the normalised step and its length are choices made here.

The steps are unrolled: inside a loop primitive, XLA's CPU backend runs convolutions an order of
magnitude slower.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lpa_jax.checks import (
    array,
    check_labels,  # noqa: F401 (users reach it here, too)
    choice,
    function,
    integer,
    is_known,
    number,
    require,
)
from lpa_jax.labels import Labels, one_each, rows_of_positions
from lpa_jax.parallel.explicit_axes import in_auto_axes, in_own_axes
from lpa_jax.tables import (
    BatchClasses,
    SeveralClasses,
    as_rows,
    at_least_float32,
    class_counts,  # noqa: F401 (users reach the class statistics as pgd.class_means, ...)
    class_means,  # noqa: F401
    class_sums,  # noqa: F401
    inner_products,
    over_classes,
    perturbation_dtype,
    row_norms,
    unit_rows,
)

GEOMETRIES = ("signed", "free", "flipped")
NORMS = ("l2", "linf")
SHAPES = ("full", "channel")

Array = jax.Array
LossFn = Callable[[Array], Array]


class PGDOptions(NamedTuple):
    """The static options of a class-level ascent.

    Attributes:
      steps: Number of ascent steps, each one forward and one backward pass above the activation.
      step_size: Total path length in radii; one step is `step_size * eps_c / steps` long.
      geometry: `"signed"` keeps s_c <delta_c, hbar_c> >= 0, `"flipped"` reverses it, `"free"` drops
        it.
      norm: `"l2"` (normalised gradient, ball) or `"linf"` (gradient sign, box).
      shape: `"full"` (one value per activation entry) or `"channel"` (one value per channel).
      min_cosine: Smallest s_c cos(delta_c, hbar_c) (of -hbar_c for `"flipped"`), in [0, 1]: above
        0 the half-space becomes a cone, whose perturbations change the norm to first order. If
        the loss pulls almost straight against it, the cone's nearest point is its apex: delta is 0.
    """

    steps: int = 3
    step_size: float = 1.5
    geometry: str = "signed"
    norm: str = "l2"
    shape: str = "full"
    min_cosine: float = 0.0

    def validate(self) -> "PGDOptions":
        """The same options, numbers of JAX as those of NumPy.

        Raises:
          ValueError: An option is out of range.
        """
        steps = integer("steps", self.steps, minimum=0)
        step_size = number("step_size", self.step_size, open_low=True)
        choice("geometry", self.geometry, GEOMETRIES)
        choice("norm", self.norm, NORMS)
        choice("shape", self.shape, SHAPES)
        min_cosine = number("min_cosine", self.min_cosine, 0.0, 1.0)
        has_cone = self.geometry != "free" or min_cosine == 0
        allowed = "0 with geometry='free', which has no cone"
        require(has_cone, "min_cosine", allowed, min_cosine)
        return self._replace(steps=steps, step_size=step_size, min_cosine=min_cosine)


def reduce_to_shape(values: Array, shape: str, reduction=jnp.mean) -> Array:
    """[B, *S] -> [B, *S] (`full`) or [B, 1, ..., 1, channels] (`channel`: reduces positions)."""
    if shape == "full" or values.ndim <= 2:
        return values
    return reduction(values, axis=tuple(range(1, values.ndim - 1)), keepdims=True)


def row_shape(activation: Array | jax.ShapeDtypeStruct, shape: str) -> tuple[int, ...]:
    """Shape of one perturbation of an activation [B, *S], S or (1, ..., 1, channels).

    Example:
      >>> row_shape(jax.ShapeDtypeStruct((32, 8, 8, 16), jnp.float32), "channel")
      (1, 1, 16)
    """
    return jax.eval_shape(lambda h: reduce_to_shape(h, shape), activation).shape[1:]


def cone_directions(class_mean: Array, sign: Array, geometry: str) -> Array | None:
    """Unit axes u_c of the cones <delta_c, u_c> >= min_cosine ||delta_c||, or None without one."""
    if geometry == "free":
        return None
    orientation = sign if geometry == "signed" else -sign
    return over_classes(orientation, class_mean) * unit_rows(class_mean)


def project(
    delta: Array,
    radius: Array,
    cone: Array | None,
    norm: str = "l2",
    min_cosine: float = 0.0,
) -> Array:
    r"""Projects every row into its ball and cone.

    For l2 this is the exact Euclidean projection: the cone's apex is the ball's centre, so
    projecting on it first and scaling into the ball afterwards lands on the nearest point of the
    intersection. For linf the box is clipped first; where the cone then cuts, the row is projected
    on it and scaled back into the box, which is feasible, but not always nearest.

    Args:
      delta: [C, *S].
      radius: [C], eps_c >= 0, in units of the activation.
      cone: [C, *S] unit axes or None, from `cone_directions`.
      norm: `"l2"` or `"linf"`.
      min_cosine: Smallest cosine of a row and its axis, in [0, 1]; 0 is a half-space.

    Example:
      >>> delta, cone = jnp.array([[3.0, 4.0], [-1.0, 1.0]]), jnp.array([[1.0, 0.0], [1.0, 0.0]])
      >>> print(np.asarray(project(delta, jnp.array([1.0, 2.0]), cone)).round(2))
      [[0.6 0.8]
       [0.  1. ]]
      >>> print(np.asarray(project(delta, jnp.array([5.0, 5.0]), cone, min_cosine=0.8)).round(2))
      [[3.84 2.88]
       [0.   0.  ]]
    """
    shape, delta = delta.shape, as_rows(delta)
    bound = over_classes(radius.astype(delta.dtype), delta)
    if norm == "linf":
        delta = jnp.clip(delta, -bound, bound)
    if cone is not None:
        delta = _into_cone(delta, as_rows(cone), min_cosine)
    norms = over_classes(row_norms(delta, norm), delta)
    scaled = jnp.where(norms > bound, delta * (bound / jnp.where(norms > 0, norms, 1.0)), delta)
    return jnp.reshape(scaled, shape)


def _into_cone(delta: Array, axis: Array, min_cosine: float) -> Array:
    """The nearest point of {d : <d, axis> >= min_cosine ||d||} for every row; axes may be zero."""
    along = inner_products(delta, axis)
    if min_cosine == 0:
        return delta - over_classes(jnp.minimum(along, 0.0), delta) * axis
    across = delta - over_classes(along, delta) * axis
    width = row_norms(across)
    # A class mean of zero has no direction, and its row no constraint.
    cosine = jnp.where(inner_products(axis, axis) > 0, min_cosine, 0.0)
    sine = jnp.sqrt(1 - cosine**2)
    # In the plane of axis and row the cone's edge is a ray; from behind it, its apex is nearest.
    reach = jnp.maximum(along * cosine + width * sine, 0.0)
    shrink = reach * sine / jnp.where(width > 0, width, 1.0)
    nearest = over_classes(reach * cosine, delta) * axis + over_classes(shrink, delta) * across
    inside = (along >= 0) & (width * cosine <= along * sine)
    return jnp.where(over_classes(inside, delta), delta, nearest)


def ascent_step(
    delta: Array | None,
    gradient: Array,
    sign: Array,
    radius: Array,
    cone: Array | None,
    options: PGDOptions,
) -> Array:
    """One signed, normalised gradient step and a projection; `delta=None` is zero."""
    shape, gradient = gradient.shape, as_rows(gradient)
    direction = unit_rows(gradient) if options.norm == "l2" else jnp.sign(gradient)
    length = sign * radius * (options.step_size / max(options.steps, 1))
    step = over_classes(length.astype(gradient.dtype), gradient) * direction
    moved = step if delta is None else as_rows(delta) + step
    return jnp.reshape(project(moved, radius, cone, options.norm, options.min_cosine), shape)


def add_to_members(activations: Array, delta: Array | None, labels: Array) -> Array:
    """h_i + delta_{y_i} in the activation's own dtype; `delta=None` adds nothing.

    Args:
      activations: [B, ...], or [B, *P, ...] with labels of positions.
      delta: [C, ...], from `class_perturbation`.
      labels: [B] or [B, *P]; what has label -1 is not perturbed.

    Example:
      >>> h, labels = jnp.ones((1, 3, 1)), jnp.array([[1, 0, -1]])
      >>> add_to_members(h, jnp.array([[1.0], [2.0]]), labels)[0, :, 0].tolist()
      [3.0, 2.0, 1.0]
    """
    if delta is None:
        return activations
    rows = rows_of_positions(activations, labels.shape)
    classes = BatchClasses(jnp.reshape(labels, -1), jnp.zeros(delta.shape[0]))
    return jnp.reshape(add_perturbation(rows, delta, classes), activations.shape)


def add_perturbation(
    activations: Array, delta: Array | None, classes: BatchClasses | SeveralClasses
) -> Array:
    """h_i + what a table of perturbations adds to example i; `delta=None` adds nothing."""
    if delta is None:
        return activations
    moved = activations.astype(delta.dtype) + classes.members_of(delta)
    return moved.astype(activations.dtype)


def class_gradient(
    loss_fn: Callable,
    activations: Array,
    classes: BatchClasses | SeveralClasses,
    delta: Array | None,
    shape: str = "full",
) -> tuple[Array, Array]:
    """Gradients of J_c at delta_c for all classes with one forward and one backward pass.

    Args:
      loss_fn: [B, *S] perturbed activations -> ([B] losses, auxiliary output).
      activations: [B, *S].
      classes: The classes of the global batch.
      delta: [C, *S'] or None for zero.
      shape: `"full"` or `"channel"`.

    Returns:
      The table of gradients [C, *S'] and the auxiliary output of `loss_fn`.
    """

    def total_loss(perturbed):
        losses, aux = loss_fn(perturbed)
        return jnp.sum(losses), aux

    perturbed = add_perturbation(activations, delta, classes)
    gradients, aux = jax.grad(total_loss, has_aux=True)(perturbed)
    members = reduce_to_shape(gradients.astype(perturbation_dtype(activations)), shape, jnp.sum)
    return classes.means_of_gradients(members), aux


def ascend(
    gradient_fn: Callable[[Array | None], Array],
    sign: Array,
    radius: Array,
    cone: Array | None,
    options: PGDOptions,
    initial: Array | None = None,
    first_gradient: Array | None = None,
) -> Array | None:
    """Projects `initial` (None is zero), then runs `options.steps` unrolled ascent steps from it.

    A caller that has already computed the gradient at the start passes it as `first_gradient`,
    which saves one pass.
    """
    delta = initial
    if delta is not None:
        delta = project(delta, radius, cone, options.norm, options.min_cosine)
    for step in range(options.steps):
        reuse = step == 0 and first_gradient is not None
        gradient = first_gradient if reuse else gradient_fn(delta)
        delta = ascent_step(delta, gradient, sign, radius, cone, options)
    return delta


def ascend_by_class(
    gradient_fn: Callable[[Array | None], Array],
    activations: Array,
    classes: BatchClasses | SeveralClasses,
    sign: Array,
    radius: Array,
    options: PGDOptions,
    initial: Array | None = None,
    first_gradient: Array | None = None,
) -> Array | None:
    """Runs the ascent of all classes in their sets K_c, for `class_perturbation` and for `lpa`.

    Args:
      gradient_fn: Table of perturbations or None -> table of gradients, as by `class_gradient`.
      activations: h_i, [B, *S], whose class means give the cones.
      classes: The classes of the global batch.
      sign: s_c, a table [C].
      radius: eps_c, a table [C]; 0 for absent classes.
      options: Steps, geometry, norm and shape.
      initial: Table to start from, in the dtype of the perturbation; it is projected first.
      first_gradient: See `ascend`.

    Returns:
      The table of perturbations, or None for zero without steps.
    """
    cone = None
    if options.geometry != "free":
        means = classes.means(reduce_to_shape(at_least_float32(activations), options.shape))
        cone = cone_directions(means, sign, options.geometry)
    return ascend(gradient_fn, sign, radius, cone, options, initial, first_gradient)


def class_perturbation(
    loss_fn: LossFn,
    activations: Array,
    labels: Array,
    *,
    sign: Array,
    radius: Array,
    steps: int = 3,
    step_size: float = 1.5,
    geometry: str = "signed",
    norm: str = "l2",
    shape: str = "full",
    min_cosine: float = 0.0,
    initial: Array | None = None,
    several: bool = False,
    axis_name: str | None = None,
) -> Array:
    r"""Learns one perturbation per class by projected gradient ascent on the class's own loss.

        delta_c <- Proj_{K_c}( delta_c + s_c * eta_c * grad J_c / ||grad J_c|| ),    `steps` times,
        eta_c = step_size * eps_c / steps.

    Guarantees, for every option: ||delta_c|| <= eps_c; a class that is absent from the global
    batch, has sign 0 or radius 0 gets exactly zero; with `geometry="signed"`, ||hbar_c + delta_c||
    >= ||hbar_c|| where s_c = +1, and <= where s_c = -1 and ||delta_c|| <= 2 min_cosine ||hbar_c||
    (up to rounding); zero gradients and zero activations give finite results; no gradient flows
    through the result.

    Args:
      loss_fn: Perturbed activations [B, *S] -> losses [B] (of positions [B, *P]). Targets (hard or
        soft), the rest of the network and its parameters are closed over.
      activations: h_i at the injection point, [B, *S], any rank, float32, bfloat16 or float64.
      labels: y_i, [B] integers in 0..C-1, the classes that share a perturbation; -1 for an example
        that has no part in any. Labels of positions, [B, *P], belong to activations [B, *P, *S]:
        every position is a member of its class.
      sign: s_c in {-1, 0, +1}, [C]. +1 raises the class's loss, -1 lowers it.
      radius: eps_c >= 0, [C], in units of the activation's norm.
      steps: Ascent steps; 0 returns the projected `initial`, or zero.
      step_size: Path length of all steps together, in radii.
      geometry: `"signed"`, `"free"` or `"flipped"`, see `PGDOptions`.
      norm: `"l2"` or `"linf"`.
      shape: `"full"`, or `"channel"` for one value per channel (the last axis), shared by
        all positions.
      min_cosine: See `PGDOptions`; of the channel means for `"channel"`.
      initial: Starting perturbations [C, *S'] carried over from an earlier call, or None for zero.
      several: `labels` are [B, C] of 0 and 1: example i is a member of m_i classes, and each of
        them moves it by delta_c / m_i, so that ||h~_i - h_i|| is at most their mean radius.
      axis_name: Mapped axis over which the batch is spread. Class means are then taken over the
        global batch.

    Returns:
      delta, [C, *S] for `"full"` and [C, 1, ..., 1, channels] for `"channel"`, float32 or wider.

    Raises:
      ValueError: An option out of range, arguments whose shapes disagree, or (outside jit) labels
        outside -1..C-1, a sign other than -1, 0, 1, a radius that is negative or not finite.

    Example:
      >>> h, y = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
      >>> loss = lambda h: 0.5 * jnp.sum(h**2, axis=-1)      # grows with the norm
      >>> signs, radii = jnp.array([1.0, -1.0]), jnp.array([0.5, 0.5])
      >>> class_perturbation(loss, h, y, sign=signs, radius=radii).round(3).tolist()
      [[0.5, 0.0], [0.0, -0.5]]

    References:
      Method of arXiv 2605.29525 (abstract); equations as in the module docstring.
    """
    options = PGDOptions(steps, step_size, geometry, norm, shape, min_cosine).validate()
    function("loss_fn", loss_fn, "activations")
    loss_fn = in_own_axes(loss_fn, activations)
    return _class_perturbation(
        loss_fn, activations, labels, sign, radius, options, initial, several, axis_name
    )


@in_auto_axes()
def _class_perturbation(
    loss_fn, activations, labels, sign, radius, options, initial, several, axis_name
):
    activations, labels = array("activations", activations), array("labels", labels)
    sign, radius = array("sign", sign), array("radius", radius)
    labels = _checked_labels(activations, labels, sign, radius, several)
    dtype, whole = perturbation_dtype(activations), activations.shape
    activations = rows_of_positions(jax.lax.stop_gradient(activations), labels.lead)
    sign, radius = (jax.lax.stop_gradient(v).astype(dtype) for v in (sign, radius))

    classes = BatchClasses.of(labels.rows, sign.shape[0], axis_name, dtype)
    radius = jnp.where((classes.counts > 0) & (sign != 0), jnp.maximum(radius, 0.0), 0.0)
    table = (sign.shape[0], *row_shape(activations, options.shape))
    if initial is not None:
        require(jnp.shape(initial) == table, "initial", f"of shape {table}", jnp.shape(initial))
        initial = jax.lax.stop_gradient(initial).astype(dtype)

    def losses(rows):
        values = one_each(loss_fn(jnp.reshape(rows, whole)), labels.lead)
        return (labels.counted(values) if labels.may_interact else values), None

    def gradient_fn(delta):
        return class_gradient(losses, activations, classes, delta, options.shape)[0]

    delta = ascend_by_class(gradient_fn, activations, classes, sign, radius, options, initial)
    return jnp.zeros(table, dtype) if delta is None else jax.lax.stop_gradient(delta)


def _checked_labels(
    activations: Array, labels: Array, sign: Array, radius: Array, several: bool
) -> Labels:
    """The labels; ValueError for shapes that disagree and, outside jit, for values out of range."""
    floating = activations.ndim >= 1 and jnp.issubdtype(activations.dtype, jnp.floating)
    if not floating:
        got = f"{activations.dtype} {activations.shape}"
        raise ValueError(f"activations must be a floating array [B, ...], got {got}")
    require(sign.dtype != bool, "sign", "-1, 0 or 1 for every class", sign)
    if sign.ndim != 1 or radius.shape != sign.shape:
        got = f"{sign.shape} and {radius.shape}"
        raise ValueError(f"sign and radius must both have shape [C], got {got}")
    lead = labels.shape[:-1] if several else labels.shape
    if not lead or lead != activations.shape[: len(lead)]:
        allowed = (
            f"[B, C] of the activations {activations.shape}"
            if several
            else (f"{activations.shape[:1]} like the activations")
        )
        raise ValueError(f"labels must have shape {allowed}, got {labels.shape}")
    shape = jax.ShapeDtypeStruct((*lead, sign.shape[0]), activations.dtype)
    given = Labels.of({"label": labels}, shape)
    # NumPy reads the values: jnp would stage the test under jit, also where they are constants.
    if is_known(sign):
        signs = np.asarray(sign)
        require(np.isin(signs, (-1, 0, 1)).all(), "sign", "-1, 0 or 1 for every class", signs)
    if is_known(radius):
        radii = np.asarray(radius)
        valid = np.all(np.isfinite(radii) & (radii >= 0))
        require(valid, "radius", "finite and >= 0 for every class", radii)
    return given
