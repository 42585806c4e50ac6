"""Class-level PGD at an injection point: the algorithm of `lpa` and `lpl`."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lpa_jax import pgd, tables
from lpa_jax.assignment import Assignment
from lpa_jax.checks import choice, is_known, number, require, vanishes
from lpa_jax.perturbations import radius_target as targeting
from lpa_jax.perturbations.base import Applied, Feedback, Perturbation, Site, identity
from lpa_jax.tables import BatchClasses, SeveralClasses

MODES = ("cold", "carry", "free")
SCALES = ("relative", "absolute")

Array = jax.Array
State = dict[str, Array]


def class_level(
    name: str,
    options: pgd.PGDOptions,
    *,
    radius: float,
    assignment: Assignment,
    scale: str,
    negative_scale: float,
    mode: str = "cold",
    radius_target: float | None = None,
    probability: float = 1.0,
    examples: float = 1.0,
    memory_limit: int | None = None,
    description: str = "",
) -> Perturbation:
    """The perturbation behind `lpa` and `lpl`; see `lpa` for the arguments.

    Raises:
      ValueError: An option out of range.
    """
    number("radius", radius)
    number("negative_scale", negative_scale)
    rule = isinstance(assignment, Assignment)
    require(rule, "assignment", "an Assignment such as all_positive()", assignment)
    choice("mode", mode, MODES)
    choice("scale", scale, SCALES)
    number("probability", probability, high=1.0, open_low=True)
    number("examples", examples, high=1.0, open_low=True)
    require(mode == "cold" or examples == 1, "examples", f"1 with mode={mode!r}", examples)
    if memory_limit is not None:
        number("memory_limit", memory_limit)
    if radius_target is not None:
        number("radius_target", radius_target, open_low=True)
    options.validate()
    require(mode != "free" or options.steps == 1, "steps", "1 with mode='free'", options.steps)
    if vanishes(radius) or options.steps == 0:
        return identity(name)._replace(by_label=True, description=description)
    method = _ClassLevel(
        name=name,
        options=options,
        radius=radius,
        assignment=assignment,
        scale=scale,
        negative_scale=negative_scale,
        mode=mode,
        radius_target=radius_target,
        probability=probability,
        examples=examples,
        memory_limit=memory_limit,
    )
    update = method.update if mode == "free" else None
    return Perturbation(
        name, method.init, method.apply, update, by_label=True, description=description
    )


class _Rows(NamedTuple):
    """The rows of a batch's tables: min(C, global batch) classes, or this device's examples.

    Attributes:
      classes: The classes of the global batch, numbered by row.
      index: Class of each row, C for an unused row; None if row c is class c.
    """

    classes: BatchClasses | SeveralClasses
    index: Array | None

    def read(self, table: Array) -> Array:
        """These rows of a table of all classes [C, ...]."""
        return table if self.index is None else table.at[self.index].get(mode="fill", fill_value=0)

    def write(self, table: Array, rows: Array) -> Array:
        """The table of all classes with these rows replaced; absent classes keep theirs."""
        if self.index is not None:
            return table.at[self.index].set(rows, mode="drop")
        return jnp.where(tables.over_classes(self.classes.counts > 0, table), rows, table)


def _rows(site: Site, classes: BatchClasses | SeveralClasses, may_be_by_example: bool) -> _Rows:
    if site.several:
        return _Rows(classes, None)
    labels, axis_name = site.labels, site.axis_name
    devices = 1 if axis_name is None else jax.lax.psum(1, axis_name)
    num_rows = min(site.num_classes, labels.shape[0] * devices)
    index, renumbered = None, classes
    if num_rows < site.num_classes:
        labels = tables.beyond_if_ignored(labels, site.num_classes)
        index = jnp.flatnonzero(classes.counts > 0, size=num_rows, fill_value=site.num_classes)
        counts = classes.counts.at[index].get(mode="fill", fill_value=0)
        number = jnp.where(site.labels < 0, -1, jnp.searchsorted(index, labels))
        renumbered = BatchClasses(number, counts, axis_name)
    if may_be_by_example and labels.shape[0] < num_rows:
        # On a pod a device has few examples: arithmetic on the rows of all classes would cost more
        # than the network.
        by_example = tables.beyond_if_ignored(site.labels, site.num_classes)
        return _Rows(renumbered._replace(by_example=True), by_example)
    return _Rows(renumbered, index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ClassLevel:
    name: str
    options: pgd.PGDOptions
    radius: float
    assignment: Assignment
    scale: str
    negative_scale: float
    mode: str
    radius_target: float | None
    probability: float
    examples: float
    memory_limit: int | None

    def init(self, activation: jax.ShapeDtypeStruct, num_classes: int) -> State:
        self.assignment.check_num_classes(num_classes)
        state = {}
        if self.mode != "cold":
            self._check_memory(activation, num_classes)
            row = pgd.row_shape(activation, self.options.shape)
            state["delta"] = jnp.zeros((num_classes, *row), pgd.perturbation_dtype(activation))
        if self._remembers_confidence:
            state["confidence"] = jnp.zeros(num_classes, jnp.float32)
            state["known"] = jnp.zeros(num_classes, bool)
        if self.radius_target is not None:
            state["radius_scale"] = targeting.initial_scale()
        return state

    def apply(self, state: State, site: Site) -> Applied:
        classes, chosen = _count(site), self._chosen(site)
        rows = _rows(site, classes, may_be_by_example=self.mode == "cold" and chosen is None)
        # Gradients and confidences are those of `part`, class means and norms of the whole batch.
        if chosen is None:
            part, of_rows, outputs = site, rows.classes, _count_outputs(site, classes)
        else:
            part, of_rows = site.part(chosen), rows.classes.part(chosen)
            classes = outputs = classes.part(chosen)
        activation = jax.lax.stop_gradient(part.activation)
        gradient_at = functools.partial(
            pgd.class_gradient,
            part.losses_and_logits,
            activation,
            of_rows,
            shape=self.options.shape,
        )
        first_gradient, logits = None, None
        if self.mode == "cold":
            # Every device sums all rows, even if it then steps only those of its own examples.
            self._check_memory(activation, rows.classes.counts.shape[0])
            first_gradient, logits = gradient_at(delta=None)
        elif self.mode == "carry" and self.assignment.uses_confidence:
            logits = part.decode(activation)
        state = self._observe(state, outputs, logits)
        sign, radius, present = self._signs_and_radii(state, site, classes, outputs, logits)

        delta = self._ascend(
            state,
            site,
            rows,
            sign,
            radius,
            lambda delta: gradient_at(delta=delta)[0],
            first_gradient,
            steps=0 if self.mode == "free" else self.options.steps,
        )
        if self.mode == "carry":
            state = {**state, "delta": rows.write(state["delta"], delta)}
        stopped = jax.lax.stop_gradient(delta)
        perturbed = pgd.add_perturbation(site.activation, stopped, rows.classes)
        aux = {"sign": sign, "radius": radius, "present": present}
        if self.radius_target is not None:
            aux["radius_scale"] = state["radius_scale"]
            adapted = targeting.adapt(
                state["radius_scale"],
                part,
                outputs,
                sign,
                unperturbed=part.decode(activation) if logits is None else logits,
                perturbed=perturbed if chosen is None else perturbed[chosen],
                target=self.radius_target,
                negative_scale=self.negative_scale,
            )
            state = {**state, "radius_scale": adapted}
        reached = self._on_some(site, perturbed)
        return Applied(reached, site.targets, jax.lax.stop_gradient(state), aux)

    def _chosen(self, site: Site) -> Array | None:
        """Positions of the examples that PGD runs on, [M]; None for all."""
        size = math.ceil(self.examples * site.labels.shape[0])
        if size == site.labels.shape[0]:
            return None
        plain = not site.several and site.output_labels is None
        require(plain, "examples", "1 unless an example has one label", self.examples)
        return tables.spread_over_classes(site.labels, size)

    def _on_some(self, site: Site, perturbed: Array) -> Array:
        """The perturbed activation of each example with `probability`, else its own."""
        if is_known(self.probability) and self.probability == 1.0:
            return perturbed
        chosen = jax.random.bernoulli(site.rng, self.probability, perturbed.shape[:1])
        return jnp.where(tables.over_classes(chosen, perturbed), perturbed, site.activation)

    def update(self, state: State, site: Site, feedback: Feedback) -> State:
        """One ascent step of `mode="free"` with the gradient of the training pass."""
        classes = _count(site)
        rows = _rows(site, classes, may_be_by_example=False)
        outputs = _count_outputs(site, classes)
        state = self._observe(state, outputs, feedback.logits)
        sign, radius, _ = self._signs_and_radii(state, site, classes, outputs, None)
        gradient = feedback.gradient.astype(state["delta"].dtype)
        members = pgd.reduce_to_shape(gradient, self.options.shape, jnp.sum)
        gradient = rows.classes.means_of_gradients(members)
        delta = self._ascend(state, site, rows, sign, radius, None, gradient, steps=1)
        return {**state, "delta": rows.write(state["delta"], delta)}

    def _ascend(self, state, site, rows, sign, radius, gradient_fn, first_gradient, steps) -> Array:
        """The perturbations after `steps`, from zero or from those kept in the state."""
        activation = jax.lax.stop_gradient(site.activation)
        dtype = pgd.perturbation_dtype(activation)
        return pgd.ascend_by_class(
            gradient_fn,
            activation,
            rows.classes,
            rows.read(sign).astype(dtype),
            rows.read(radius).astype(dtype),
            self.options._replace(steps=steps),
            initial=rows.read(state["delta"]) if "delta" in state else None,
            first_gradient=first_gradient,
        )

    @property
    def _remembers_confidence(self) -> bool:
        rule = self.assignment
        return rule.uses_confidence and (rule.ema > 0 or self.mode == "free")

    def _observe(self, state: State, classes, logits: Array | None) -> State:
        """The state with this batch's confidence averaged in, if it keeps a confidence."""
        if logits is None or not self._remembers_confidence:
            return state
        confidence, present = _batch_confidence(classes, logits), classes.counts > 0
        old, ema = state["confidence"], self.assignment.ema
        smoothed = jnp.where(state["known"], ema * old + (1 - ema) * confidence, confidence)
        return {
            **state,
            "confidence": jnp.where(present, smoothed, old).astype(old.dtype),
            "known": state["known"] | present,
        }

    def _signs_and_radii(
        self, state: State, site: Site, classes, outputs, logits: Array | None
    ) -> tuple[Array, Array, Array]:
        """s_c and eps_c for every class, and which classes are present, all [C].

        `classes` are those of the activation's rows, `outputs` those of the logits' rows.
        """
        present = classes.counts > 0
        confidence = jnp.zeros(site.num_classes, jnp.float32)
        if self._remembers_confidence:
            confidence, present = state["confidence"], present & state["known"]
        elif self.assignment.uses_confidence:
            confidence = _batch_confidence(outputs, logits)
        sign, multiplier = self.assignment(confidence, present)
        radius = self.radius * multiplier * jnp.where(sign < 0, self.negative_scale, 1.0)
        if self.radius_target is not None:
            radius = radius * targeting.by_class(state["radius_scale"], sign)
        if self.scale == "relative":
            wide = tables.at_least_float32(jax.lax.stop_gradient(site.activation))
            reduced = pgd.reduce_to_shape(wide, self.options.shape)
            radius = radius * site.global_mean(tables.row_norms(reduced, self.options.norm))
        return sign, jnp.where(sign != 0, radius, 0.0), present

    def _check_memory(self, activation: Array | jax.ShapeDtypeStruct, num_rows: int) -> None:
        """Raises ValueError if a table of `num_rows` classes is larger than `memory_limit`."""
        row = pgd.row_shape(activation, self.options.shape)
        entry_bytes = pgd.perturbation_dtype(activation).itemsize

        def table_bytes(row):
            return num_rows * math.prod(row) * entry_bytes

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


def _count(site: Site) -> BatchClasses | SeveralClasses:
    dtype = pgd.perturbation_dtype(site.activation)
    return BatchClasses.of(site.labels, site.num_classes, site.axis_name, dtype)


def _count_outputs(site: Site, classes):
    """The classes of the rows of the logits: those of the activation, if not given apart."""
    if site.output_labels is None:
        return classes
    dtype = classes.counts.dtype
    return BatchClasses.of(site.output_labels, site.num_classes, site.axis_name, dtype)


def _batch_confidence(classes: BatchClasses | SeveralClasses, logits: Array) -> Array:
    """q_c, the mean probability of the true class over the global batch, [C]."""
    return classes.confidence(tables.at_least_float32(jax.lax.stop_gradient(logits)))


def _bytes(count: int) -> str:
    return f"{count / 1e6:.4g} MB"
