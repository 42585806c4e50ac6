"""The taps by which perturbations act in a pass through a network."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lpa_jax.injection import Tap
from lpa_jax.perturbations.base import Applied, Perturbation, Site

Array = jax.Array


def counted_labels(batch: Mapping[str, Array]) -> Array:
    """The labels of a batch, -1 for the examples that do not count: labels of -1, masks of 0."""
    labels = jnp.asarray(batch["label"])
    if jnp.issubdtype(labels.dtype, jnp.unsignedinteger):
        labels = labels.astype(jnp.int32)
    return labels if "mask" not in batch else jnp.where(batch["mask"] != 0, labels, -1)


class PerturbedPass:
    """One pass through a network; each perturbation sees what those below it left.

    Attributes:
      targets: Soft targets [B, C] after the perturbations so far.
      states: State of the perturbation at each layer, replaced when its tap runs.
    """

    def __init__(
        self,
        batch: Mapping[str, Array],
        num_classes: int,
        states: Mapping[str, Any],
        loss: Callable[[Array, Array], Array],
        axis_name: str | None = None,
    ):
        self.targets = jax.nn.one_hot(batch["label"], num_classes)
        self.states = dict(states)
        self._batch, self._loss, self._axis_name = batch, loss, axis_name

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
            site = Site(
                activation=activation,
                targets=self.targets,
                labels=self._batch["label"],
                decode=decode,
                loss=self._loss,
                rng=rng,
                axis_name=self._axis_name,
                domain=self._batch.get("domain"),
            )
            applied = perturbation.apply(self.states[layer], site)
            new = (applied.activation, applied.targets, applied.state)
            if used is not None:
                old = (activation, self.targets, self.states[layer])
                new = jax.tree.map(lambda new, old: jnp.where(used, new, old), new, old)
            perturbed, self.targets, self.states[layer] = new
            return after(site, applied, perturbed)

        return tap
