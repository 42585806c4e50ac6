"""The train state, and the perturbations and penalties that a step is called with."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax

from lpa_jax import checks, injection, optimizers
from lpa_jax.checks import is_known
from lpa_jax.injection import Network
from lpa_jax.labels import Labels
from lpa_jax.penalties import Penalty
from lpa_jax.perturbations import Perturbation
from lpa_jax.perturbations.base import check_perturbations
from lpa_jax.perturbations.perturbed_pass import initial_state

Array = jax.Array
Batch = Mapping[str, Any]  # of NumPy or JAX arrays
# By layer or tuple of layers: type checkers refuse a dict[str, ...] where keys are a union.
Perturbations = Mapping[Any, Perturbation]
Penalties = Mapping[str, Penalty]


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes, and the static objects that change it.

    Attributes:
      step: Number of steps taken.
      params: Trained parameters.
      model_state: The network's other variables (running statistics).
      opt_state: The optimizer's state.
      perturbation_state: State of the perturbation at each layer.
      penalty_state: State of each penalty.
      rng: The run's key; every random choice is keyed by folding `step` into it.
      network: The network, static.
      optimizer: The optax transformation, static.
      num_classes: C, static.
    """

    step: Array
    params: Any
    model_state: Mapping[str, Any]
    opt_state: optax.OptState
    perturbation_state: Mapping[str, Any]
    penalty_state: Mapping[str, Any]
    rng: Array
    network: Network = flax.struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = flax.struct.field(pytree_node=False)
    num_classes: int = flax.struct.field(pytree_node=False)

    @classmethod
    def create(
        cls,
        model: Network | flax.linen.Module,
        optimizer: optax.GradientTransformation,
        rng: Array,
        example_batch: Batch,
        perturbations: Perturbations | None = None,
        penalties: Penalties | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> "TrainState":
        """The state before the first step.

        Args:
          model: A staged model, or a `Network` from `inject` or `CutFunctions`.
          optimizer: An optax transformation.
          rng: A key; parameters and all later randomness come from it.
          example_batch: `{"image": [B, ...], ...}`, only its shapes matter.
          perturbations: Layer (or tuple of layers) -> perturbation, as for `lpa_step`.
          penalties: Name -> penalty, as for `lpa_step`.
          variables: Replace initial variables, as a part of their tree: pretrained weights, for
            example from `models.pretrained.convert`.

        Raises:
          ValueError: Unknown layer, a layer named twice, or a perturbation that does not fit,
            or `variables` with a name that the network does not have.

        Example:
          >>> from lpa_jax.models import MLP
          >>> batch = {"image": jnp.zeros((4, 2, 2, 1)), "label": jnp.zeros(4, jnp.int32)}
          >>> TrainState.create(MLP(num_classes=3), optax.sgd(0.1), jax.random.key(0), batch).step
          Array(0, dtype=int32)
        """
        network, optimizer = injection.as_network(model), _transformation(optimizer)
        plan, penalties = plan_sites(perturbations or {}, network.layers), penalties or {}
        check_penalties(penalties, network.layers)
        checks.key("rng", rng)
        params_rng, run_rng = jax.random.split(rng)
        example_batch = injection.read_batch(network, example_batch, labels=False)
        inputs = example_batch["image"]
        variables = replaced(network.init(params_rng, inputs), variables or {})
        layers = {layer for site in plan for layer in site.layers}
        layers |= {layer for penalty in penalties.values() for layer in penalty.layers}
        shapes = injection.activation_shapes(
            network, variables, inputs, (*sorted(layers), injection.LOGITS)
        )
        num_classes = shapes[injection.LOGITS].shape[-1]
        params = variables.pop("params")
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=variables,
            opt_state=optimizer.init(params),
            perturbation_state=_states(plan, shapes, example_batch),
            penalty_state={
                name: penalty.init({layer: shapes[layer] for layer in penalty.layers}, num_classes)
                for name, penalty in penalties.items()
            },
            rng=run_rng,
            network=network,
            optimizer=optimizer,
            num_classes=num_classes,
        )

    def __repr__(self) -> str:
        """A summary in one line; arrays are not shown."""
        step = int(self.step) if is_known(self.step) and self.step.shape == () else "?"
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))
        perturbed = ", ".join(self.perturbation_state) or "none"
        penalties = f", penalties: {', '.join(self.penalty_state)}" if self.penalty_state else ""
        return (
            f"TrainState(step {step}, network: {named(self.network)}, {count:,} parameters, "
            f"{self.num_classes} classes, perturbations at: {perturbed}{penalties})"
        )

    @property
    def variables(self) -> dict[str, Any]:
        """Parameters and model state as the network takes them."""
        return {"params": self.params, **self.model_state}


def named(network: Network) -> str:
    """The network by the class of its model and its layers."""
    model = network
    while inner := getattr(model, "network", None):  # accumulation, names of batches
        model = inner
    model = getattr(model, "model", getattr(model, "module", model))
    return f"{type(model).__name__} cut at {', '.join(network.layers)}"


def _transformation(optimizer: Any) -> optax.GradientTransformation:
    """The optimizer as a transformation that gets the extra arguments of `lpa_step`."""
    if isinstance(optimizer, optax.MultiSteps):
        return optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    optimizers.check_transformation(optimizer)
    return optimizer


def replaced(variables: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The variables, with those of `new`, a part of the same tree, in their places.

    Raises:
      ValueError: `new` has a name that `variables` do not have.

    Example:
      >>> replaced({"params": {"a": 1, "b": 2}, "batch_stats": {}}, {"params": {"b": 3}})
      {'params': {'a': 1, 'b': 3}, 'batch_stats': {}}
    """
    checks.instance("variables", new, Mapping, "a dictionary like those of the network")
    merged = dict(variables)
    for name, value in new.items():
        if name not in merged:
            raise ValueError(f"variables have no {name!r} to be replaced")
        merged[name] = replaced(merged[name], value) if isinstance(value, Mapping) else value
    return merged


class PlannedSite(NamedTuple):
    """A perturbation and its layer, or the layers of which each step draws one."""

    layers: tuple[str, ...]
    perturbation: Perturbation


def plan_sites(perturbations: Perturbations, layers: Sequence[str]) -> tuple[PlannedSite, ...]:
    """The perturbations and their layers, in the order given.

    Raises:
      ValueError: Not a perturbation, an unknown layer, or a layer that is named twice.
    """
    check_perturbations(perturbations)
    plan = []
    taken: set[str] = set()
    for key, perturbation in perturbations.items():
        site_layers = (key,) if isinstance(key, str) else key
        named = bool(site_layers) and isinstance(site_layers, tuple)
        checks.require(named, "key of perturbations", "a layer or a tuple of layers", key)
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


def initial_states(
    perturbations: Perturbations, network: Any, variables: Mapping[str, Any], batch: Batch
) -> dict[str, Any]:
    """Layer -> state of its perturbation before the first step.

    Args:
      perturbations: As for `perturbed_forward`.
      network: As for `perturbed_forward`.
      variables: As for `perturbed_forward`; only shapes matter.
      batch: An example batch; only shapes matter.

    Raises:
      ValueError: An unknown layer, or a perturbation that does not fit.
    """
    network = injection.as_network(network)
    batch = injection.read_batch(network, batch, labels=False)
    plan = plan_sites(perturbations, network.layers)
    layers = [layer for site in plan for layer in site.layers]
    shapes = injection.activation_shapes(
        network, variables, batch["image"], (*layers, injection.LOGITS)
    )
    return _states(plan, shapes, batch)


def _states(plan, shapes: Mapping[str, jax.ShapeDtypeStruct], batch: Batch) -> dict[str, Any]:
    labels = Labels.of_shape(batch.get("label"), shapes[injection.LOGITS])
    return {
        layer: initial_state(layer, site.perturbation, shapes[layer], labels)
        for site in plan
        for layer in site.layers
    }


def check_penalties(penalties: Penalties, layers: Sequence[str]) -> None:
    """Raises ValueError for anything but a penalty, and for features of an unknown layer."""
    checks.instance("penalties", penalties, Mapping, "a dictionary {name: penalty}")
    for name, penalty in penalties.items():
        checks.instance(f"penalties[{name!r}]", penalty, Penalty, "a Penalty")
        for layer in penalty.layers:
            injection.check_layer(layers, layer)


def check_given(
    perturbations: Perturbations | None, penalties: Penalties | None, state: TrainState
) -> None:
    """Raises ValueError for a step without what the state was created with, unless it says so."""
    checks.instance("state", state, TrainState, "a TrainState")
    for name, given, created in (
        ("perturbations", perturbations, state.perturbation_state),
        ("penalties", penalties, state.penalty_state),
    ):
        if given is None and created:
            raise ValueError(
                f"{name} must be those that the state was created with ({', '.join(created)}), or "
                "{} for a step without, got None"
            )


def check_states(plan: Sequence[PlannedSite], penalties: Penalties, state: TrainState) -> None:
    """Raises ValueError if the state was created without a layer's or a penalty's state."""
    for layer in (layer for site in plan for layer in site.layers):
        if layer not in state.perturbation_state:
            raise ValueError(
                f"perturbations name layer {layer!r}, but the state was created with those at "
                f"[{', '.join(state.perturbation_state)}]"
            )
    for name in penalties:
        if name not in state.penalty_state:
            raise ValueError(
                f"penalties name {name!r}, but the state was created with "
                f"[{', '.join(state.penalty_state)}]"
            )
