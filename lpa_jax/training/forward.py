"""A pass through a network under perturbations: what every training step is made of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lpa_jax import checks, injection
from lpa_jax.labels import Labels
from lpa_jax.losses import cross_entropy
from lpa_jax.losses.base import check_fits
from lpa_jax.parallel.explicit_axes import AxisName, check_auto_axes, check_axis_name
from lpa_jax.perturbations import Feedback, Site
from lpa_jax.perturbations.perturbed_pass import PerturbedPass
from lpa_jax.tables import weight_of_counted
from lpa_jax.training.state import Batch, Perturbations, PlannedSite, plan_sites

Array = jax.Array
Loss = Callable[[Array, Array], Array]


class Seen(NamedTuple):
    """What the site of a perturbation that learns held, and whether the perturbation was used."""

    activation: Array
    targets: Array
    labels: Array
    output_labels: Array | None
    domain: Array | None
    rng: Array
    used: Array


class Forward(NamedTuple):
    """What `perturbed_forward` returns.

    Attributes:
      logits: Of the perturbed network, [B, C], or [B, *P, C] with labels of positions.
      targets: Soft targets of the same shape, as the perturbations left them.
      states: Layer -> the perturbation's state after the pass.
      model_state: The network's variables but `params`, updated if it was in training mode.
      labels: The labels, -1 where they do not count.
      features: Layer -> activation as the layers above got it, of the layers to watch.
      seen: What `learned_states` needs.
      sown: Collection -> values that the network has sown in the pass, of those asked for.
    """

    logits: Array
    targets: Array
    states: Mapping[str, Any]
    model_state: Mapping[str, Any]
    labels: Labels
    features: Mapping[str, Array]
    seen: Mapping[str, Seen]
    sown: Mapping[str, Any]

    def mean(self, losses: Array, axis_name: str | None = None) -> Array:
        """Mean of `losses` over the labels that count, [B] or [B, *P] -> scalar.

        The global batch's mean is the mean over the devices of `axis_name` of the results.
        """
        return self.labels.mean(self.labels.counted(losses), axis_name)


def perturbed_forward(
    perturbations: Perturbations,
    states: Mapping[str, Any],
    network: Any,
    variables: Mapping[str, Any],
    batch: Batch,
    *,
    rng: Array,
    loss: Loss = cross_entropy,
    train: bool = True,
    axis_name: AxisName = None,
    probes: Mapping[str, Array] | None = None,
    watch: Sequence[str] = (),
    sown: Sequence[str] = (),
    num_classes: int | None = None,
) -> Forward:
    r"""Runs a network once under perturbations: logits and targets for a loss of one's own.

    `lpa_step` is this function, a gradient and an optimizer. The network below a perturbed layer
    runs once, and gradients flow through it; none flow through a learned perturbation.

    Args:
      perturbations: Layer (or tuple of layers, of which one is drawn) -> perturbation.
      states: From `initial_states`, or `Forward.states` of the step before.
      network: A staged model, or a `Network` from `inject` or `CutFunctions`.
      variables: `{"params": ..., **model_state}`.
      batch: As for `lpa_step`.
      rng: A key for this step: fold the step's number into the run's key.
      loss: (logits [B, C], targets [B, C]) -> [B]: what learned perturbations raise or lower. It
        can differ from the loss that the result is used in.
      train: Training mode (dropout, batch statistics).
      axis_name: As for `lpa_step`.
      probes: From `zero_probes`; needed by perturbations that learn from the training pass, such
        as `lpa(mode="free")`.
      watch: Layers whose activations the result has in `features`.
      sown: Collections of sown values that the result has in `sown`, such as `"losses"`; of NNX
        modules the class of their variables, `"Intermediate"`.
      num_classes: C; None asks the network.

    Raises:
      ValueError: An unknown layer, no state for a layer, missing probes, labels or a loss that do
        not fit, a batch without an entry that is needed, or nothing sown in a collection.

    Example:
      >>> import lpa_jax
      >>> network = lpa_jax.CutFunctions(lambda p, x: x @ p["w"], lambda p, h: h @ p["v"])
      >>> variables = {"params": {"w": jnp.ones((3, 2)), "v": jnp.eye(2)}}
      >>> batch = {"image": jnp.ones((2, 3)), "label": jnp.array([0, 1])}
      >>> perturbations = {"hidden": lpa_jax.lpa(0.1)}
      >>> states = lpa_jax.initial_states(perturbations, network, variables, batch)
      >>> out = lpa_jax.perturbed_forward(
      ...     perturbations, states, network, variables, batch, rng=jax.random.key(0))
      >>> float(out.mean(lpa_jax.cross_entropy(out.logits, out.targets))) > 0
      True
    """
    network = injection.as_network(network)
    plan = plan_sites(perturbations, network.layers)
    checks.key("rng", rng)
    for name, given in (("states", states), ("probes", probes or {})):
        checks.instance(name, given, Mapping, f"a dictionary {{layer: {name[:-1]}}}")
    for name, given in (("watch", watch), ("sown", sown)):
        several = isinstance(given, Sequence) and not isinstance(given, str)
        checks.require(several, name, "a list or tuple of names", given)
    if plan:
        check_auto_axes("variables and batch", (variables, batch))
    batch = injection.read_batch(network, batch)
    check_axis_name(batch, axis_name)
    labels = batch_labels(network, variables, batch, num_classes)
    check_fits(loss, labels.several)
    missing = [layer for site in plan for layer in site.layers if layer not in states]
    if missing:
        raise ValueError(f"states must have one for layer {missing[0]!r}, got {sorted(states)}")
    probes = probes or {}
    unprobed = [layer for layer in learning_layers(plan) if layer not in probes]
    if unprobed:
        raise ValueError(
            f"probes must be those of zero_probes, since the perturbation at {unprobed[0]!r} "
            f"learns from the gradient there, got {sorted(probes)}"
        )
    _, dropout, sites, draw = step_keys(rng, axis_name)
    perturbed = PerturbedPass(labels, states, loss, axis_name, batch.get("domain"))
    taps, seen = _perturbing_taps(perturbed, plan, probes, network.layers, sites, draw)
    taps, features = _watching_taps(taps, watch)
    given = injection.Pass(variables, batch["image"], train, dropout, tuple(sown))
    logits, model_state = injection.run_perturbed(network, given, taps)
    recorded = {name: model_state.get(name) for name in sown}
    for name, values in recorded.items():
        if not values:
            raise ValueError(f"sown must name collections that the model sows, got {name!r}")
    model_state = {name: value for name, value in model_state.items() if name not in recorded}
    fits = logits.shape[-1] == labels.num_classes
    checks.require(fits, "num_classes", f"{logits.shape[-1]}, as logits", labels.num_classes)
    targets = jnp.reshape(perturbed.targets, logits.shape)
    states = perturbed.states
    return Forward(logits, targets, states, model_state, labels, features, seen, recorded)


def zero_probes(
    perturbations: Perturbations, network: Any, variables: Mapping[str, Any], batch: Batch
) -> dict[str, Array]:
    """Zeros that are added at the layers of perturbations that learn, to get gradients there.

    Differentiate the loss with respect to them and hand the gradients to `learned_states`.
    Arguments as for `initial_states`.
    """
    network = injection.as_network(network)
    layers = learning_layers(plan_sites(perturbations, network.layers))
    inputs = injection.read_batch(network, batch, labels=False)["image"]
    shapes = injection.activation_shapes(network, variables, inputs, layers)
    return {layer: jnp.zeros(shape.shape, shape.dtype) for layer, shape in shapes.items()}


def learned_states(
    perturbations: Perturbations,
    forward: Forward,
    gradients: Mapping[str, Array],
    *,
    loss: Loss = cross_entropy,
    axis_name: str | None = None,
) -> dict[str, Any]:
    """The states after perturbations have learned from the gradients of the training pass.

    Args:
      perturbations: As for `perturbed_forward`.
      forward: Its result.
      gradients: Layer -> gradient with respect to the probe there of `forward.mean(losses)`.
      loss: As for `perturbed_forward`.
      axis_name: As for `perturbed_forward`.
    """
    logits = jax.lax.stop_gradient(forward.logits)
    logits = jnp.reshape(logits, (-1, logits.shape[-1]))
    states = dict(forward.states)
    rows = forward.labels.rows
    updates = {
        layer: perturbation.update
        for key, perturbation in perturbations.items()
        for layer in ((key,) if isinstance(key, str) else key)
    }
    for layer, seen in forward.seen.items():
        site = Site(
            activation=seen.activation,
            targets=seen.targets,
            labels=seen.labels,
            decode=None,
            loss=loss,
            rng=seen.rng,
            axis_name=axis_name,
            domain=seen.domain,
            output_labels=seen.output_labels,
        )
        # A probe's gradient is that of the mean over the rows that count, not of each row.
        gradient = jnp.reshape(gradients[layer], seen.activation.shape)
        counted = rows.shape[0] / weight_of_counted(rows, axis_name)
        feedback = Feedback(gradient * counted.astype(gradient.dtype), logits)
        new = updates[layer](states[layer], site, feedback)
        states[layer] = jax.tree.map(
            lambda new, old, used=seen.used: jnp.where(used, new, old), new, states[layer]
        )
    return states


def batch_labels(
    network: injection.Network, variables: Any, batch: Batch, num_classes: int | None = None
) -> Labels:
    """The labels of a batch, checked against the shape of the network's logits.

    Raises:
      ValueError: Labels that do not fit.
    """
    shape = jnp.shape(batch["label"])
    if len(shape) == 1 and num_classes is not None:
        num_classes = checks.integer("num_classes", num_classes, 1)
        return Labels.of(batch, jax.ShapeDtypeStruct((*shape, num_classes), jnp.float32))
    shapes = injection.activation_shapes(network, variables, batch["image"], [injection.LOGITS])
    return Labels.of(batch, shapes[injection.LOGITS])


def step_keys(rng: Array, axis_name: str | None) -> tuple[Array, Array, Array, Array]:
    """Keys of augmentation, dropout, sites and draws; dropout and sites differ by device."""
    augment, dropout, sites, draw = jax.random.split(rng, 4)
    if axis_name is not None:
        device = jax.lax.axis_index(axis_name)
        dropout, sites = jax.random.fold_in(dropout, device), jax.random.fold_in(sites, device)
    return augment, dropout, sites, draw


def learning_layers(plan: Sequence[PlannedSite]) -> list[str]:
    """The layers of perturbations that learn from the training pass."""
    return [layer for site in plan if site.perturbation.update is not None for layer in site.layers]


def _perturbing_taps(
    perturbed: PerturbedPass,
    plan: Sequence[PlannedSite],
    probes: Mapping[str, Array],
    layers: Sequence[str],
    sites: Array,
    draws: Array,
) -> tuple[dict[str, injection.Tap], dict[str, Seen]]:
    """Layer -> tap that perturbs, and layer -> what these taps record."""
    taps: dict[str, injection.Tap] = {}
    seen: dict[str, Seen] = {}

    def learning(layer, used):
        def after(site, applied, activation):
            del applied
            seen[layer] = Seen(
                activation=jax.lax.stop_gradient(site.activation),
                targets=site.targets,
                labels=site.labels,
                output_labels=site.output_labels,
                domain=site.domain,
                rng=site.rng,
                used=jnp.ones((), bool) if used is None else used,
            )
            return activation + probes[layer]

        return {"after": after}

    for position, site in enumerate(plan):
        draw = jax.random.fold_in(draws, position)
        drawn = jax.random.randint(draw, (), 0, len(site.layers))
        for i, layer in enumerate(site.layers):
            used = None if len(site.layers) == 1 else drawn == i
            rng = jax.random.fold_in(sites, layers.index(layer))
            extra = learning(layer, used) if site.perturbation.update is not None else {}
            taps[layer] = perturbed.tap(layer, site.perturbation, rng, used, **extra)
    return taps, seen


def _watching_taps(
    taps: Mapping[str, injection.Tap], watch: Sequence[str]
) -> tuple[dict[str, injection.Tap], dict[str, Array]]:
    """The taps with those that record, and layer -> activation, which these record."""
    features: dict[str, Array] = {}

    def watched(layer, perturb):
        def tap(activation, decode):
            features[layer] = activation if perturb is None else perturb(activation, decode)
            return features[layer]

        return tap

    watching = {layer: watched(layer, taps.get(layer)) for layer in watch}
    return {**taps, **watching}, features
