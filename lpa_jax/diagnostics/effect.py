"""What a perturbation does to one batch: the loss and the norm before and after it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lpa_jax import injection, metrics
from lpa_jax.perturbations import Perturbation, Site
from lpa_jax.pgd import row_norms

Array = jax.Array
GROUPS = {"positive": 1.0, "negative": -1.0, "neutral": 0.0}


def perturbation_effect(
    network: injection.Network,
    variables: injection.Variables,
    states: Mapping[str, Any],
    batch: Mapping[str, Array],
    *,
    perturbations: Mapping[str, Perturbation],
    loss: Callable[[Array, Array], Array],
    rng: Array,
) -> dict[str, metrics.Pair]:
    r"""Loss change and norm ratio that each perturbation causes, by sign of the class.

        loss_change = loss(decode(h~_i), t~_i) - loss(decode(h_i), t_i)
        norm_ratio  = ||h~_i|| / ||h_i||

    A radius means different things at different layers, models and augmentations; the loss change
    that it causes compares between them. Costs two forward passes above each perturbed layer and
    works for every method and mode. Classes are grouped by the sign that an assignment gave them:
    `positive`, `negative`, or `neutral` (no sign, or a method that has none).

    Args:
      network: a cut network.
      variables: its parameters and model state, which are left alone.
      states: layer -> perturbation state, as in `TrainState.perturbation_state`.
      batch: `{"image": [B, ...], "label": [B]}`.
      perturbations: layer -> perturbation, one layer each.
      loss: (logits, targets) -> [B].
      rng: key for dropout and random perturbations.

    Returns:
      (sum, count) pairs named `layer/loss_change/group` and `layer/norm_ratio/group`.
    """
    labels = batch["label"]
    shapes = injection.activation_shapes(network, variables, batch["image"], (injection.LOGITS,))
    num_classes = shapes[injection.LOGITS].shape[-1]
    dropout_rng, site_rng = jax.random.split(rng)
    targets = {"now": jax.nn.one_hot(labels, num_classes)}
    pairs: dict[str, metrics.Pair] = {}

    def tap_at(layer, perturbation, depth):
        def tap(activation, decode):
            rng = jax.random.fold_in(site_rng, depth)
            site = Site(activation, targets["now"], labels, decode, loss, rng)
            applied = perturbation.apply(states[layer], site)
            before, _ = site.losses_and_logits(activation)
            after = loss(decode(applied.activation), applied.targets)
            sign = applied.aux.get("sign", jnp.zeros(num_classes))[labels]
            norms = row_norms(activation.astype(jnp.float32))
            values = {
                "loss_change": after - before,
                "norm_ratio": row_norms(applied.activation.astype(jnp.float32))
                / jnp.where(norms > 0, norms, 1.0),
            }
            for name, value in values.items():
                for group, wanted in GROUPS.items():
                    pairs[f"{layer}/{name}/{group}"] = metrics.mean(value, sign == wanted)
            targets["now"] = applied.targets
            return applied.activation

        return tap

    taps = {
        layer: tap_at(layer, perturbation, depth)
        for depth, (layer, perturbation) in enumerate(perturbations.items())
    }
    injection.forward(network, variables, batch["image"], taps, train=True, rng=dropout_rng)
    return pairs
