"""The penalty interface: a scalar added to the training objective, a value like a perturbation.

    objective = mean_i loss_i + sum_p penalty_p

Domain generalization (CORAL, IRM, V-REx, GroupDRO, ...) and implicit augmentation (ISDA) act on the
objective, not on an activation; so they have an interface of their own, as small as the other one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from lpa_jax.registry import Registry, describe

Array = jax.Array
State = Any


@dataclasses.dataclass(frozen=True)
class Observed:
    """What a penalty sees of the training pass, on this device's share of the batch.

    Gradients reach the parameters through `losses`, `logits`, `features` and `decode`. With labels
    of positions, B is the number of positions, and a penalty that names layers is refused.

    Attributes:
      losses: loss_i, [B].
      logits: z_i, [B, C].
      targets: Soft targets as the perturbations left them, [B, C].
      labels: Classes y_i, [B] integers, -1 where an example does not count; or [B, C] of 0, 1, -1.
      domain: Each example's domain, [B] integers in 0..D-1, or None if the batch names none.
      features: Activation at each layer that the penalty names, [B, *S], as the layers
        above get it (perturbed, if a perturbation acts there).
      decode: (layer, activation at that layer) -> logits of the network above it, in evaluation
        mode.
      loss: (logits, targets) -> [B], the training loss.
      step: Steps taken so far, a scalar integer.
      axis_name: Mapped axis over which the global batch is spread, or None.
      sown: Collection -> values that the network has sown, of those that the penalty names.
    """

    losses: Array
    logits: Array
    targets: Array
    labels: Array
    domain: Array | None
    features: Mapping[str, Array]
    decode: Callable[[str, Array], Array]
    loss: Callable[[Array, Array], Array]
    step: Array
    axis_name: str | None = None
    sown: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def global_sum(self, values: Array) -> Array:
        """Sum over the mapped axis of what was summed over this device's examples."""
        return values if self.axis_name is None else jax.lax.psum(values, self.axis_name)


class Penalty(NamedTuple):
    """Pure functions that add a scalar to the objective.

    The scalar is that of the global batch and equal on all devices: sums over examples go through
    `Observed.global_sum` before anything non-linear. The step averages the devices' gradients,
    which together with psum's own transpose gives the gradient of that scalar.

    Attributes:
      name: The penalty's name in the registry.
      layers: The layers whose features it needs.
      init: (shapes of the features by layer, num_classes) -> state, a pytree of arrays.
      apply: (state, observed) -> (scalar, next state); the next state is equal on all devices.
      description: What `print` shows, such as `vrex(num_domains=3, ...)`.
      sown: Collections of sown values (`Module.sow`) that it needs.
    """

    name: str
    layers: tuple[str, ...]
    init: Callable[[Mapping[str, jax.ShapeDtypeStruct], int], State]
    apply: Callable[[State, Observed], tuple[Array, State]]
    description: str = ""
    sown: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """The factory's call, with all options."""
        return self.description or f"{self.name}(...)"


_REGISTRY: Registry[Penalty] = Registry("penalty", describe=describe)
register = _REGISTRY.register
names = _REGISTRY.names
options = _REGISTRY.options
option_types = _REGISTRY.option_types
create = _REGISTRY.create
