"""The taps by which perturbations act in a pass through a network."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lpa_jax.checks import require
from lpa_jax.injection import Tap
from lpa_jax.labels import Labels, rows_of_positions
from lpa_jax.perturbations.base import Applied, Perturbation, Site, State

Array = jax.Array


class PerturbedPass:
    """One pass through a network; each perturbation sees what those below it left.

    Attributes:
      targets: Soft targets of the rows [N, C] after the perturbations so far.
      states: State of the perturbation at each layer, replaced when its tap runs.
    """

    def __init__(
        self,
        labels: Labels,
        states: Mapping[str, Any],
        loss: Callable[[Array, Array], Array],
        axis_name: str | None = None,
        domain: Array | None = None,
    ):
        self.targets = labels.targets
        self.states = dict(states)
        self._labels, self._loss = labels, labels.of_counted(loss)
        self._axis_name, self._domain = axis_name, domain

    def tap(
        self,
        layer: str,
        perturbation: Perturbation,
        rng: Array,
        used: Array | None = None,
        after: Callable[[Site, Applied, Array], Array] = lambda site, applied, perturbed: perturbed,
    ) -> Tap:
        """The tap that applies a perturbation at a layer.

        Args:
          layer: The layer.
          perturbation: The perturbation.
          rng: The site's key.
          used: Whether the perturbation takes effect, a traced boolean; None if it always does.
          after: (site, result of `apply`, perturbed activation) -> activation from which the pass
            continues.
        """

        def tap(activation, decode):
            if not jnp.issubdtype(activation.dtype, jnp.floating):
                raise ValueError(
                    f"the activation at {layer!r} must be floating to be perturbed, "
                    f"got {activation.dtype}"
                )
            site = self._site(layer, perturbation, activation, decode, rng)
            applied = perturbation.apply(self.states[layer], site)
            perturbed = jnp.reshape(applied.activation, activation.shape)
            targets = jnp.reshape(applied.targets, self.targets.shape)
            new = (perturbed, targets, applied.state)
            if used is not None:
                old = (activation, self.targets, self.states[layer])
                new = jax.tree.map(lambda new, old: jnp.where(used, new, old), new, old)
            perturbed, self.targets, self.states[layer] = new
            return after(site, applied, perturbed)

        return tap

    def _site(self, layer, perturbation, activation, decode, rng) -> Site:
        """What the perturbation sees: rows if it is `by_label`, whole examples otherwise."""
        labels = self._labels
        own, output_labels = labels, None
        if perturbation.by_label:
            own = labels_at(layer, perturbation, labels, activation)
            output_labels = labels.rows if perturbation.labels_of is not None else None
        site = Site(
            activation=activation,
            targets=self.targets,
            labels=own.rows,
            decode=decode,
            loss=self._loss,
            rng=rng,
            axis_name=self._axis_name,
            domain=self._domain,
            output_labels=output_labels,
        )
        if len(own.lead) == len(labels.lead) == 1:
            return site
        if not perturbation.by_label:
            targets = jnp.reshape(self.targets, (*labels.lead, labels.num_classes))
            return dataclasses.replace(site, labels=labels.values, targets=targets)

        def decode_rows(rows, chosen=None):
            require(chosen is None, "examples", "1 unless an example has one label", "less")
            logits = decode(jnp.reshape(rows, activation.shape))
            return jnp.reshape(logits, (-1, labels.num_classes))

        return dataclasses.replace(
            site,
            activation=rows_of_positions(activation, own.lead),
            decode=decode_rows,
            domain=by_row(self._domain, own),
        )


def by_row(values: Array | None, labels: Labels) -> Array | None:
    """One value an example, [B], for every row of its, [N]; None stays None."""
    if values is None or len(labels.lead) == 1:
        return values
    return jnp.repeat(values, math.prod(labels.lead[1:]))


def labels_at(layer: str, perturbation: Perturbation, labels: Labels, activation: Any) -> Labels:
    """The labels of the rows of a perturbation `by_label`.

    Args:
      layer: Its layer.
      perturbation: The perturbation.
      labels: The labels of the batch.
      activation: The activation there, or its shape and dtype.

    Raises:
      ValueError: The labels name other positions than the activation has.
    """
    if perturbation.labels_of is not None:
        shape = jax.ShapeDtypeStruct(activation.shape, activation.dtype)
        values = perturbation.labels_of(labels.values, shape, labels.num_classes)
        labels = dataclasses.replace(labels, values=values)
    lead = labels.lead
    if lead != activation.shape[: len(lead)]:
        raise ValueError(
            f"labels of shape {lead} must be the first axes of the activation at {layer!r}, got "
            f"{activation.shape}; perturbations.with_labels gives the layer labels of its own"
        )
    return labels


def initial_state(
    layer: str,
    perturbation: Perturbation,
    activation: jax.ShapeDtypeStruct,
    labels: Labels,
) -> State:
    """The perturbation's state before the first step, for labels of which the shape is known."""
    shape = tuple(activation.shape)
    if perturbation.by_label:

        def rows(values):
            given = dataclasses.replace(labels, values=values)
            return labels_at(layer, perturbation, given, activation).values

        values = jax.eval_shape(rows, labels.values)
        lead = dataclasses.replace(labels, values=values).lead
        shape = (math.prod(lead), *shape[len(lead) :])
    return perturbation.init(jax.ShapeDtypeStruct(shape, activation.dtype), labels.num_classes)
