"""The training pass of a step: the walk up the network in which perturbations and penalties act.

What `step.py` differentiates. The pass hands each perturbation its site; afterwards those that
learn from the pass are handed their gradient.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lpa_jax import injection
from lpa_jax.penalties import Observed
from lpa_jax.perturbations import Perturbation, Site
from lpa_jax.training.plan import Penalties, PlannedSite
from lpa_jax.training.state import TrainState

Array = jax.Array


def check_states(plan: Sequence[PlannedSite], penalties: Penalties, state: TrainState) -> None:
    """Raises ValueError for a layer or penalty that the state was created without."""
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


class StepKeys(NamedTuple):
    """Keys of one step; `draw` is equal on all devices."""

    augment: Array
    dropout: Array
    sites: Array
    draw: Array


def step_keys(state: TrainState, axis_name: str | None) -> StepKeys:
    """The keys of the step that the state is about to take, on this device."""
    augment, dropout, sites, draw = jax.random.split(jax.random.fold_in(state.rng, state.step), 4)
    if axis_name is not None:
        device = jax.lax.axis_index(axis_name)
        dropout, sites = jax.random.fold_in(dropout, device), jax.random.fold_in(sites, device)
    return StepKeys(augment, dropout, sites, draw)


class Seen(NamedTuple):
    """What a perturbation that learns from the training pass saw in it, and whether it was used."""

    activation: Array
    targets: Array
    rng: Array
    used: Array


class TrainingPass:
    """What the taps of one training pass share while it walks up the network.

    Attributes:
      targets: soft targets as the perturbations so far have left them.
      states: state of the perturbation at each layer, renewed as its tap is passed.
      seen: what perturbations that learn from the pass saw.
      features: the activations that penalties ask for.
    """

    def __init__(self, plan, state, batch, loss, keys, axis_name, probes, feature_layers):
        self._labels, self._domain = batch["label"], batch.get("domain")
        self.targets = jax.nn.one_hot(self._labels, state.num_classes)
        self.states = dict(state.perturbation_state)
        self.seen: dict[str, Seen] = {}
        self.features: dict[str, Array] = {}
        self._feature_layers = feature_layers
        self._plan, self._loss = plan, loss
        self._keys, self._axis_name, self._probes = keys, axis_name, probes
        self._depth = {layer: i for i, layer in enumerate(state.network.layers)}

    def taps(self) -> dict[str, injection.Tap]:
        """A tap for every layer where something is perturbed or watched."""
        taps = self._perturbing_taps()
        for layer in self._feature_layers:
            taps[layer] = self._watched(layer, taps.get(layer))
        return taps

    def _watched(self, layer: str, perturb: injection.Tap | None) -> injection.Tap:
        def tap(activation, decode):
            passed_on = activation if perturb is None else perturb(activation, decode)
            self.features[layer] = passed_on
            return passed_on

        return tap

    def _perturbing_taps(self) -> dict[str, injection.Tap]:
        taps = {}
        for position, site in enumerate(self._plan):
            rng = jax.random.fold_in(self._keys.draw, position)
            drawn = jax.random.randint(rng, (), 0, len(site.layers))
            for i, layer in enumerate(site.layers):
                used = None if len(site.layers) == 1 else drawn == i
                taps[layer] = self._tap(layer, site.perturbation, used)
        return taps

    def _tap(self, layer: str, perturbation: Perturbation, used: Array | None) -> injection.Tap:
        def tap(activation, decode):
            if not jnp.issubdtype(activation.dtype, jnp.floating):
                raise ValueError(
                    f"only a floating activation can be perturbed, {layer!r} is {activation.dtype}"
                )
            rng = jax.random.fold_in(self._keys.sites, self._depth[layer])
            site = Site(
                activation,
                self.targets,
                self._labels,
                decode,
                self._loss,
                rng,
                self._axis_name,
                self._domain,
            )
            before = (activation, self.targets, self.states[layer])
            applied = perturbation.apply(self.states[layer], site)
            after = (applied.activation, applied.targets, applied.state)
            if used is not None:
                after = jax.tree.map(lambda new, old: jnp.where(used, new, old), after, before)
            perturbed, self.targets, self.states[layer] = after
            if perturbation.update is None:
                return perturbed
            self.seen[layer] = Seen(
                activation=jax.lax.stop_gradient(activation),
                targets=before[1],
                rng=rng,
                used=jnp.ones((), bool) if used is None else used,
            )
            return perturbed + self._probes[layer]

        return tap


def probes_for(plan: Sequence[PlannedSite], state: TrainState, images: Array) -> dict[str, Array]:
    """Zeros added at the layers whose perturbation wants the gradient there."""
    layers = [
        layer for site in plan if site.perturbation.update is not None for layer in site.layers
    ]
    shapes = injection.activation_shapes(state.network, state.variables, images, layers)
    return {layer: jnp.zeros(shape.shape, shape.dtype) for layer, shape in shapes.items()}


def learn(plan, states, seen, probe_gradients, feedback_of, site_of):
    """Hands the training pass's gradient to the perturbations that learn from it."""
    learned = dict(states)
    for site in plan:
        for layer in site.layers:
            if layer not in seen:
                continue
            used = seen[layer].used
            after = site.perturbation.update(
                states[layer], site_of(seen[layer]), feedback_of(probe_gradients[layer])
            )
            learned[layer] = jax.tree.map(
                lambda new, old, used=used: jnp.where(used, new, old), after, states[layer]
            )
    return learned


def penalize(
    penalties: Penalties, states: Mapping[str, Any], observed: Observed
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The value of every penalty and its next state, by name."""
    values, new_states = {}, {}
    for name, penalty in penalties.items():
        values[name], state = penalty.apply(states[name], observed)
        new_states[name] = jax.lax.stop_gradient(state)
    return values, new_states
