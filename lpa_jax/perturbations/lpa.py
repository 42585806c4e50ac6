"""LPA: one learned perturbation per class at a hidden layer, expansive or contractive."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lpa_jax import pgd, tables
from lpa_jax.assignment import Assignment, by_confidence
from lpa_jax.checks import vanishes
from lpa_jax.perturbations import radius_target as targeting
from lpa_jax.perturbations.base import (
    Applied,
    Feedback,
    Perturbation,
    Site,
    check_range,
    identity,
    register,
)

MODES = ("cold", "carry", "free")
SCALES = ("relative", "absolute")

Array = jax.Array
State = dict[str, Array]


@register("lpa")
def lpa(
    radius: float = 0.1,
    steps: int | None = None,
    *,
    assignment: Assignment | None = None,
    mode: str = "cold",
    geometry: str = "signed",
    shape: str = "full",
    norm: str = "l2",
    step_size: float = 1.5,
    scale: str = "relative",
    negative_scale: float = 1.0,
    min_cosine: float = 0.0,
    radius_target: float | None = None,
    memory_limit: int | None = 2**30,
) -> Perturbation:
    r"""Learning to Perturb Activations: h~_i = h_i + delta_{y_i}, with delta_c learned by PGD.

        delta_c <- Proj_{K_c}( delta_c + s_c eta_c grad J_c / ||grad J_c|| ),
        eta_c    = step_size eps_c / steps,
        K_c      = { delta : ||delta|| <= eps_c, s_c cos(delta, hbar_c) >= min_cosine },
        eps_c    = radius * scale * m_c * (negative_scale if s_c < 0 else 1),

    with J_c the mean loss of class c's members in the global batch, hbar_c their mean activation,
    and (s_c, m_c) from the assignment rule. s_c = +1 raises the loss and the norm (expansive,
    positive augmentation), s_c = -1 lowers the loss and, to first order in delta, the norm
    (contractive, negative augmentation). Lowering the loss pulls the other way, so that with
    min_cosine = 0 delta ends at right angles to hbar_c and lengthens it a little; with min_cosine
    >= ||delta|| / (2 ||hbar_c||) it never does.

    Three modes, by cost above plain training:
      * `"cold"`: `steps` passes above the injection point, from zero, in every training step.
      * `"carry"`: the same from the delta of the class's last appearance; one step suffices. A
        `confidence` assignment costs one forward pass more.
      * `"free"`: no extra pass. The gradient that the training pass leaves at the injection point
        moves delta for the next time; a `confidence` assignment then reads the training pass's
        logits, so under the perturbation.

    Args:
      radius: eps before scaling, >= 0. 0 is no perturbation, bitwise. Tune it per layer: useful
        values differ by orders of magnitude between layers and models.
      steps: PGD steps; None is 3 for `cold` and 1 for `carry` and `free` (which allows no other).
      assignment: which classes, how far; None is `by_confidence()`.
      mode: `"cold"`, `"carry"` or `"free"`.
      geometry: `"signed"`, or `"free"` / `"flipped"` as ablations of the half-space.
      shape: `"full"`, or `"channel"` for one value a channel: a small table for many classes.
      norm: `"l2"` or `"linf"`.
      step_size: path length of all steps together, in radii.
      scale: `"relative"` multiplies the radius by the batch mean of ||h_i|| (of the channel means
        for `shape="channel"`, in the chosen norm); `"absolute"` by 1.
      negative_scale: factor on the radius of classes with s_c = -1, >= 0.
      min_cosine: smallest cosine of s_c delta_c and hbar_c, in [0, 1] (of -s_c delta_c for
        `"flipped"`; 0 for `"free"`, which has no such bound).
      radius_target: loss change in nats, > 0, to which the radius is slowly adapted, by a factor
        for each sign group that starts at 1 (`perturbations/radius_target.py`); for the negative
        one the target, too, is multiplied by `negative_scale`. None keeps the radius. Costs no pass
        with `"cold"` where nothing above is perturbed; `"free"`, and `"carry"` without a
        `confidence` assignment, take one forward pass more.
      memory_limit: bytes that a table may take on every device: that of all C perturbations, which
        `"carry"` and `"free"` keep, or that in which `"cold"` sums gradients, min(C, global batch)
        rows; None for any number.

    Raises:
      ValueError: an option out of range; `steps` other than 1 with `mode="free"`; from
        `TrainState.create`, a kept table larger than `memory_limit`, and from the first step one of
        gradients.

    Source: the abstract of arXiv 2605.29525 fixes class-level perturbation of a hidden layer by
    PGD, expansive or contractive; the rest is this library's choice.

    >>> perturbation = lpa(radius=0.1, mode="free")
    >>> state = perturbation.init(jax.ShapeDtypeStruct((32, 8, 8, 16), jnp.float32), 10)
    >>> state["delta"].shape
    (10, 8, 8, 16)
    """
    return class_level(
        "lpa",
        radius,
        pgd.PGDOptions(_default_steps(steps, mode), step_size, geometry, norm, shape, min_cosine),
        assignment or by_confidence(),
        mode,
        scale,
        negative_scale,
        memory_limit,
        radius_target,
    )


def class_level(
    name: str,
    radius: float,
    options: pgd.PGDOptions,
    assignment: Assignment,
    mode: str,
    scale: str,
    negative_scale: float,
    memory_limit: int | None = None,
    radius_target: float | None = None,
) -> Perturbation:
    """The perturbation that `lpa` and `lpl` share; see `lpa` for the arguments."""
    check_range("radius", radius, 0.0)
    check_range("negative_scale", negative_scale, 0.0)
    for argument, value, allowed in (("mode", mode, MODES), ("scale", scale, SCALES)):
        if value not in allowed:
            raise ValueError(f"{argument} must be one of {', '.join(allowed)}, got {value!r}")
    if memory_limit is not None:
        check_range("memory_limit", memory_limit, 0)
    if radius_target is not None:
        targeting.check_target(radius_target)
    options.validate()
    if mode == "free" and options.steps != 1:
        raise ValueError(f"steps must be 1 with mode='free', got {options.steps!r}")
    if vanishes(radius) or options.steps == 0:
        return identity(name)
    method = _ClassLevel(
        radius, options, assignment, mode, scale, negative_scale, name, memory_limit, radius_target
    )
    update = method.update if mode == "free" else None
    return Perturbation(name, method.init, method.apply, update)


def _default_steps(steps: int | None, mode: str) -> int:
    if steps is not None:
        return steps
    return 3 if mode == "cold" else 1


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The class-level PGD problem of one batch, over the U = min(C, global batch) classes in it.

    Attributes:
      slots: class of each slot, [U], C where unused; None where slot and class coincide.
      counts: [U].
      sign, radius: [U], or [B], the rows of this device's examples.
      cone: axes of the cones [U, *S'] or [B, *S'], or None.
    """

    slots: Array | None
    counts: Array
    sign: Array
    radius: Array
    cone: Array | None

    def read(self, table: Array) -> Array:
        """Rows of a class table [C, ...] -> [U, ...]."""
        return table if self.slots is None else table.at[self.slots].get(mode="fill", fill_value=0)

    def write(self, table: Array, rows: Array) -> Array:
        """The table with the rows of present classes replaced; absent classes are left alone."""
        if self.slots is not None:
            return table.at[self.slots].set(rows, mode="drop")
        return jnp.where(tables.over_classes(self.counts > 0, table), rows, table)


@dataclasses.dataclass(frozen=True)
class _ClassLevel:
    radius: float
    options: pgd.PGDOptions
    assignment: Assignment
    mode: str
    scale: str
    negative_scale: float
    name: str
    memory_limit: int | None
    radius_target: float | None

    def init(self, activation: jax.ShapeDtypeStruct, num_classes: int) -> State:
        self.assignment.check_num_classes(num_classes)
        dtype = pgd.perturbation_dtype(activation)
        state = {}
        if self.mode != "cold":
            row = self._row(activation)
            self._check_memory(row, num_classes, dtype)
            state["delta"] = jnp.zeros((num_classes, *row), dtype)
        if self._remembers_confidence:
            state["confidence"] = jnp.zeros(num_classes, jnp.float32)
            state["known"] = jnp.zeros(num_classes, bool)
        if self.radius_target is not None:
            state["radius_scale"] = targeting.initial_scale()
        return state

    def _row(self, activation: jax.ShapeDtypeStruct | Array) -> tuple[int, ...]:
        """Shape of a perturbation of `activation` [B, *S]."""
        rows = jax.eval_shape(lambda h: pgd.reduce_to_shape(h, self.options.shape), activation)
        return rows.shape[1:]

    def _check_memory(self, row: tuple[int, ...], num_rows: int, dtype: jnp.dtype) -> None:
        def table_bytes(row):
            return num_rows * math.prod(row) * dtype.itemsize

        if self.memory_limit is None or table_bytes(row) <= self.memory_limit:
            return
        does, smaller = "keeps", "mode='cold' keeps none"
        if self.mode == "cold":
            does, smaller = "sums gradients in", f"fewer than {num_rows} examples make fewer rows"
        if math.prod(row) > row[-1]:
            smaller = f"shape='channel' {does} {_bytes(table_bytes(row[-1:]))}, {smaller}"
        raise ValueError(
            f"{self.name} with mode={self.mode!r}, shape={self.options.shape!r} {does} a table of "
            f"{num_rows} classes x {row}, {_bytes(table_bytes(row))}, more than "
            f"memory_limit={_bytes(self.memory_limit)}; {smaller}"
        )

    def apply(self, state: State, site: Site) -> Applied:
        activation = jax.lax.stop_gradient(site.activation)
        slots, labels, counts = _compact(site)
        # Where no table is kept, a device needs the rows of its own examples alone: on a pod, where
        # it has few of them, arithmetic on all classes would cost more than the network.
        by_example = self.mode == "cold" and labels.shape[0] < counts.shape[0]

        def gradient_fn(delta):
            return pgd.class_gradient(
                site.losses_and_logits,
                activation,
                labels,
                delta,
                counts,
                self.options.shape,
                site.axis_name,
                by_example,
            )

        first_gradient, logits = None, None
        if self.mode == "cold":
            # Every device sums all rows, also where it then steps those of its own examples alone.
            self._check_memory(self._row(activation), counts.shape[0], counts.dtype)
            first_gradient, logits = gradient_fn(None)
        elif self.mode == "carry" and self.assignment.uses_confidence:
            logits = site.decode(activation)
        if logits is not None:
            state = self._observe(state, site, logits)
        sign, radius, present = self._signs_and_radii(state, site, logits)
        rows = labels if by_example else None
        problem = self._problem(site, slots, labels, counts, sign, radius, rows)

        delta = None
        if self.mode != "cold":
            delta = self._carried(state, problem)
        if self.mode != "free":
            delta = pgd.ascend(
                lambda d: gradient_fn(d)[0],
                delta,
                problem.sign,
                problem.radius,
                problem.cone,
                self.options,
                first_gradient,
            )
        if self.mode == "carry":
            state = {**state, "delta": problem.write(state["delta"], delta)}
        delta = jax.lax.stop_gradient(delta)
        perturbed = pgd.add_to_members(site.activation, delta, None if by_example else labels)
        aux = {"sign": sign, "radius": radius, "present": present}
        if self.radius_target is not None:
            aux["radius_scale"] = state["radius_scale"]
            adapted = targeting.adapt(
                state["radius_scale"],
                site,
                sign,
                unperturbed=site.decode(activation) if logits is None else logits,
                perturbed=perturbed,
                target=self.radius_target,
                negative_scale=self.negative_scale,
            )
            state = {**state, "radius_scale": adapted}
        return Applied(perturbed, site.targets, jax.lax.stop_gradient(state), aux)

    def update(self, state: State, site: Site, feedback: Feedback) -> State:
        """One ascent step of `mode="free"` with the gradient that the training pass left."""
        state = self._observe(state, site, feedback.logits)
        slots, labels, counts = _compact(site)
        sign, radius, _ = self._signs_and_radii(state, site, None)
        problem = self._problem(site, slots, labels, counts, sign, radius)
        delta = self._carried(state, problem)
        members = pgd.reduce_to_shape(
            feedback.gradient.astype(delta.dtype), self.options.shape, jnp.sum
        )
        gradient = pgd.class_means(members, labels, counts, site.axis_name)
        delta = pgd.ascent_step(
            delta, gradient, problem.sign, problem.radius, problem.cone, self.options
        )
        return {**state, "delta": problem.write(state["delta"], delta)}

    @property
    def _remembers_confidence(self) -> bool:
        rule = self.assignment
        return rule.uses_confidence and (rule.ema > 0 or self.mode == "free")

    def _observe(self, state: State, site: Site, logits: Array) -> State:
        """Folds the confidence of this batch into the smoothed one, where one is kept."""
        if not self._remembers_confidence:
            return state
        confidence, counts = _batch_confidence(site, logits)
        old, ema = state["confidence"], self.assignment.ema
        smoothed = jnp.where(state["known"], ema * old + (1 - ema) * confidence, confidence)
        return {
            **state,
            "confidence": jnp.where(counts > 0, smoothed, old).astype(old.dtype),
            "known": state["known"] | (counts > 0),
        }

    def _signs_and_radii(
        self, state: State, site: Site, logits: Array | None
    ) -> tuple[Array, Array, Array]:
        """s_c and eps_c for every class, and which classes are present, all [C]."""
        counts = pgd.class_counts(site.labels, site.num_classes, site.axis_name)
        present = counts > 0
        confidence = jnp.zeros(site.num_classes, jnp.float32)
        if self._remembers_confidence:
            confidence, present = state["confidence"], present & state["known"]
        elif self.assignment.uses_confidence:
            confidence, _ = _batch_confidence(site, logits)
        sign, multiplier = self.assignment(confidence, present)
        radius = self.radius * multiplier * jnp.where(sign < 0, self.negative_scale, 1.0)
        if self.radius_target is not None:
            radius = radius * targeting.by_class(state["radius_scale"], sign)
        if self.scale == "relative":
            activation = jax.lax.stop_gradient(site.activation)
            reduced = pgd.reduce_to_shape(
                activation.astype(pgd.perturbation_dtype(activation)), self.options.shape
            )
            radius = radius * site.global_mean(tables.row_norms(reduced, self.options.norm))
        return sign, jnp.where(sign != 0, radius, 0.0), present

    def _carried(self, state: State, problem: _Problem) -> Array:
        """The kept perturbations of the classes in the batch, in the sets of today."""
        rows, options = problem.read(state["delta"]), self.options
        return pgd.project(rows, problem.radius, problem.cone, options.norm, options.min_cosine)

    def _problem(self, site, slots, labels, counts, sign, radius, rows=None) -> _Problem:
        activation = jax.lax.stop_gradient(site.activation)
        dtype = pgd.perturbation_dtype(activation)
        bare = _Problem(slots, counts, sign, radius, None)
        sign, radius = bare.read(sign).astype(dtype), bare.read(radius).astype(dtype)
        if rows is not None:
            sign, radius = sign[rows], radius[rows]
        cone = None
        if self.options.geometry != "free":
            reduced = pgd.reduce_to_shape(activation.astype(dtype), self.options.shape)
            class_mean = pgd.class_means(reduced, labels, counts, site.axis_name, rows)
            cone = pgd.cone_directions(class_mean, sign, self.options.geometry)
        return _Problem(slots, counts, sign, radius, cone)


def _bytes(count: int) -> str:
    return f"{count / 1e6:.4g} MB"


def _batch_confidence(site: Site, logits: Array) -> tuple[Array, Array]:
    """q_c, the mean probability of the true class, and n_c, over the global batch, both [C]."""
    logits = jax.lax.stop_gradient(logits)
    logits = logits.astype(pgd.perturbation_dtype(logits))
    true_class = jnp.take_along_axis(jax.nn.softmax(logits), site.labels[:, None], axis=1)[:, 0]
    counts = pgd.class_counts(site.labels, site.num_classes, site.axis_name)
    return pgd.class_means(true_class, site.labels, counts, site.axis_name), counts


def _compact(site: Site) -> tuple[Array | None, Array, Array]:
    """Slots, slot of each example and slot counts, so that no table outgrows the global batch."""
    labels, num_classes, axis_name = site.labels, site.num_classes, site.axis_name
    devices = 1 if axis_name is None else jax.lax.psum(1, axis_name)
    num_slots = min(num_classes, labels.shape[0] * devices)
    slots = None
    if num_slots < num_classes:
        everywhere = labels
        if axis_name is not None:
            everywhere = jax.lax.all_gather(labels, axis_name, tiled=True)
        slots = jnp.unique(everywhere, size=num_slots, fill_value=num_classes)
        labels = jnp.searchsorted(slots, labels)
    dtype = pgd.perturbation_dtype(site.activation)
    return slots, labels, pgd.class_counts(labels, num_slots, axis_name, dtype)
