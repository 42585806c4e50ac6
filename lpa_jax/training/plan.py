"""What a step is told to do: which perturbation stands at which layer, which penalties count."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lpa_jax import injection
from lpa_jax.penalties import Penalty
from lpa_jax.perturbations import Perturbation

Perturbations = Mapping[str | tuple[str, ...], Perturbation]
Penalties = Mapping[str, Penalty]


class PlannedSite(NamedTuple):
    """A perturbation and its layer, or the layers of which each step draws one."""

    layers: tuple[str, ...]
    perturbation: Perturbation


def plan_sites(perturbations: Perturbations, layers: Sequence[str]) -> tuple[PlannedSite, ...]:
    """Which perturbation stands where.

    Raises:
      ValueError: not a perturbation, an unknown layer, or a layer that is named twice.
    """
    plan = []
    taken: set[str] = set()
    for key, perturbation in perturbations.items():
        site_layers = (key,) if isinstance(key, str) else tuple(key)
        if not isinstance(perturbation, Perturbation):
            raise ValueError(
                f"perturbations[{key!r}] must be a Perturbation, got {type(perturbation).__name__}"
            )
        for layer in site_layers:
            injection.check_layer(layers, layer)
            if layer in taken:
                raise ValueError(
                    f"layer {layer!r} is named twice in perturbations; "
                    "use perturbations.chain for several at one layer"
                )
            taken.add(layer)
        plan.append(PlannedSite(site_layers, perturbation))
    return tuple(plan)


def check_penalties(penalties: Penalties, layers: Sequence[str]) -> None:
    """Raises ValueError for what is not a penalty, or needs features of an unknown layer."""
    for name, penalty in penalties.items():
        if not isinstance(penalty, Penalty):
            raise ValueError(f"penalties[{name!r}] must be a Penalty, got {type(penalty).__name__}")
        for layer in penalty.layers:
            injection.check_layer(layers, layer)
