"""The perturbation interface: pure functions over an explicit state, as in optax.

Every method of the library (Dropout, Manifold Mixup, adversarial feature perturbation, LPL, LPA,
...) has the form h~_i = h_i + delta_i at one injection point and trains on
loss(decode(h~_i), t~_i). The methods differ only in where delta comes from (random, paired or
learned) and in what shares it (nothing: one delta per example, or a class), so they share one
interface.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lpa_jax import checks
from lpa_jax.labels import majority
from lpa_jax.registry import Registry
from lpa_jax.tables import counted_rows, over_classes, weight_of_counted

Array = jax.Array
State = Any
LabelsOf = Callable[[Array, jax.ShapeDtypeStruct, int], Array]


@dataclasses.dataclass(frozen=True)
class Site:
    """What a perturbation sees at its injection point.

    Attributes:
      activation: h_i, [B, *S].
      targets: Soft targets t_i, [B, C].
      labels: Classes y_i, [B] integers; -1 for an example that does not count, whose target is 0.
        A perturbation that mixes targets does not change them. Of several classes an example,
        [B, C] of 0, 1 and -1. With labels of positions, B is the number of positions for a
        perturbation `by_label`; for all others labels are [B, *P], targets and logits [B, *P, C].
      decode: [B, *S] -> logits [B, C], the network above the injection point. It never updates
        running statistics, sees the same dropout masks as the training pass, and no gradient
        reaches the parameters through it. `decode(activation, chosen)` runs a part, see `part`.
      loss: (logits, targets) -> [B], the training loss.
      rng: A key for this site, step and device.
      axis_name: Mapped axis over which the global batch is spread, or None.
      domain: Each example's domain, [B] integers in 0..D-1, or None if the batch names none.
      output_labels: Labels of the rows of targets, losses and logits where those of the activation
        are others (`with_labels`), or None.
    """

    activation: Array
    targets: Array
    labels: Array
    decode: Callable[[Array], Array] | None
    loss: Callable[[Array, Array], Array]
    rng: Array
    axis_name: str | None = None
    domain: Array | None = None
    output_labels: Array | None = None

    @property
    def num_classes(self) -> int:
        """C, from the targets."""
        return self.targets.shape[-1]

    @property
    def several(self) -> bool:
        """Whether an example has several classes."""
        return self.labels.ndim == self.targets.ndim

    def require_one_class(self, name: str, several: bool = False) -> None:
        """Raises ValueError for labels that perturbation `name` has no meaning for."""
        if self.labels.ndim > 1 and not (several and self.several):
            raise ValueError(
                f"{name} needs one label an example, [B], got labels of shape {self.labels.shape}"
            )

    def part(self, chosen: Array) -> "Site":
        """The site of the examples at the positions `chosen`, [M]; dropout masks are its own."""
        taken = {name: getattr(self, name)[chosen] for name in ("activation", "targets", "labels")}
        domain = None if self.domain is None else self.domain[chosen]
        decode = functools.partial(self.decode, chosen=chosen)
        return dataclasses.replace(self, **taken, domain=domain, decode=decode)

    def losses_and_logits(self, activation: Array) -> tuple[Array, Array]:
        """Per-example losses [B] and logits [B, C] of the network fed with `activation`."""
        logits = self.decode(activation)
        return self.loss(logits, jax.lax.stop_gradient(self.targets)), logits

    def global_mean(self, values: Array) -> Array:
        """Mean of `values` [B, ...] over the examples of the global batch that count."""
        counted = over_classes(counted_rows(self.labels), values)
        mean = jnp.mean(jnp.where(counted, values, 0.0), axis=0)
        mean = mean if self.axis_name is None else jax.lax.pmean(mean, self.axis_name)
        return mean * weight_of_counted(self.labels, self.axis_name).astype(mean.dtype)


class Applied(NamedTuple):
    """The result of `apply`.

    Attributes:
      activation: h~_i, [B, *S], in the dtype of the activation it replaces.
      targets: t~_i, [B, C].
      state: The state for the next step.
      aux: Diagnostics by name, equal on all devices, for example `sign` and `radius` [C].
    """

    activation: Array
    targets: Array
    state: State
    aux: Mapping[str, Array]


class Feedback(NamedTuple):
    """What a perturbation can learn from after the training pass.

    Attributes:
      gradient: d loss_i / d h~_i for every example, [B, *S], at the perturbed activation.
      logits: Logits of the training pass, [B, C].
    """

    gradient: Array
    logits: Array


class Perturbation(NamedTuple):
    """Pure functions that perturb the activation at an injection point.

    Attributes:
      name: The method's name in the registry.
      init: (activation: ShapeDtypeStruct of one batch, num_classes) -> state, a pytree of arrays.
      apply: (state, site: Site) -> Applied.
      update: (state, site, feedback: Feedback) -> state after the training pass, for methods that
        learn from its gradient at the injection point; None for all others. `site.decode` is None.
      by_label: With labels of positions, [B, *P], `init` and the site get one row for each label:
        activations [N, *R], labels [N], targets and logits [N, C], N = B * prod(P). Others get
        whole examples, [B, *P, *R].
      labels_of: (labels [B, *P], activation: ShapeDtypeStruct, num_classes) -> labels at the
        layer, of a perturbation `by_label`; None takes those of the batch. See `with_labels`.
      description: What `print` shows, such as `dropout(rate=0.5)`.
    """

    name: str
    init: Callable[[jax.ShapeDtypeStruct, int], State]
    apply: Callable[[State, Site], Applied]
    update: Callable[[State, Site, Feedback], State] | None = None
    by_label: bool = False
    labels_of: LabelsOf | None = None
    description: str = ""

    def __repr__(self) -> str:
        """The factory's call, with all options."""
        return self.description or f"{self.name}(...)"


def check_perturbations(perturbations: Mapping[Any, Perturbation]) -> None:
    """Raises ValueError unless these are perturbations by layer."""
    kind = "a dictionary {layer: perturbation}"
    checks.instance("perturbations", perturbations, Mapping, kind)
    for layer, perturbation in perturbations.items():
        checks.instance(f"perturbations[{layer!r}]", perturbation, Perturbation, "a Perturbation")


def stateless(name: str, perturb: Callable[[Site], tuple[Array, Array]]) -> Perturbation:
    """A perturbation without state from a function site -> (activation, targets).

    Example:
      >>> shift = stateless("shift", lambda site: (site.activation + 1.0, site.targets))
      >>> shift.init(jax.ShapeDtypeStruct((2, 3), jnp.float32), 10)
      ()
    """

    def apply(state, site):
        activation, targets = perturb(site)
        return Applied(activation.astype(site.activation.dtype), targets, state, {})

    return Perturbation(name, lambda activation, num_classes: (), apply)


def identity(name: str = "none") -> Perturbation:
    """No perturbation: empirical risk minimisation. Methods of zero strength return it, bitwise.

    Example:
      >>> identity().name
      'none'
    """
    return stateless(name, lambda site: (site.activation, site.targets))


def chain(*perturbations: Perturbation) -> Perturbation:
    """Several perturbations at the same injection point, one after the other.

    Each sees the activation and targets that the one before it left.

    Raises:
      ValueError: Nothing to chain; or a perturbation that learns from the training pass is not the
        first, so that it would learn at another activation than the one it perturbed.

    Example:
      >>> chain(identity("a"), identity("b")).name
      'a+b'
    """
    if not perturbations:
        raise ValueError("chain needs at least one perturbation, got none")
    for place, p in enumerate(perturbations):
        checks.instance(f"perturbations[{place}]", p, Perturbation, "a Perturbation")
        checks.require(p.labels_of is None, "with_labels", "around the chain, not inside it", p)
    for p in perturbations[1:]:
        if p.update is not None:
            raise ValueError(
                f"{p.name} learns from the training pass and must come first in a chain"
            )

    def init(activation, num_classes):
        return tuple(p.init(activation, num_classes) for p in perturbations)

    def at(site, position, activation, targets):
        rng = jax.random.fold_in(site.rng, position)
        return dataclasses.replace(site, activation=activation, targets=targets, rng=rng)

    def apply(states, site):
        activation, targets, new_states, aux = site.activation, site.targets, [], {}
        for i, (p, state) in enumerate(zip(perturbations, states, strict=True)):
            applied = p.apply(state, at(site, i, activation, targets))
            activation, targets = applied.activation, applied.targets
            new_states.append(applied.state)
            aux.update({f"{i}_{p.name}/{key}": value for key, value in applied.aux.items()})
        return Applied(activation, targets, tuple(new_states), aux)

    def update(states, site, feedback):
        first = perturbations[0].update(
            states[0], at(site, 0, site.activation, site.targets), feedback
        )
        return (first, *states[1:])

    return Perturbation(
        name="+".join(p.name for p in perturbations),
        init=init,
        apply=apply,
        update=update if perturbations[0].update else None,
        by_label=any(p.by_label for p in perturbations),
        description=f"chain({', '.join(map(repr, perturbations))})",
    )


def with_labels(perturbation: Perturbation, labels_of: LabelsOf = majority) -> Perturbation:
    """A class-level perturbation at a layer whose positions are not those of the labels.

    Args:
      perturbation: `lpa`, `lpl` or another perturbation `by_label`.
      labels_of: (labels of the batch, -1 where they do not count, activation: ShapeDtypeStruct,
        num_classes) -> labels at the layer: the first axes of the activation, those of examples
        and positions. The default takes the most frequent class of every block of positions.

    Raises:
      ValueError: The perturbation does not read labels.

    Example:
      >>> from lpa_jax.perturbations import lpa
      >>> with_labels(lpa(0.1)).name  # for labels [B, 32, 32] and an activation [B, 8, 8, 64]
      'lpa'
    """
    checks.instance("perturbation", perturbation, Perturbation, "a Perturbation")
    checks.function("labels_of", labels_of, "labels", "activation", "num_classes")
    checks.require(perturbation.by_label, "perturbation", "by class, such as lpa", perturbation)
    described = f"with_labels({perturbation!r}, {getattr(labels_of, '__name__', labels_of)})"
    return perturbation._replace(labels_of=labels_of, description=described)


_REGISTRY: Registry[Perturbation] = Registry(
    "perturbation",
    describe=lambda value, text: value._replace(description=value.description or text),
)
register = _REGISTRY.register
names = _REGISTRY.names
options = _REGISTRY.options
option_types = _REGISTRY.option_types
create = _REGISTRY.create
