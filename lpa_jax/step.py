"""One training step under perturbations, and one evaluation step: pure functions over `TrainState`.

    encode -> perturb -> decode -> loss -> gradient -> update

Nothing here knows about devices: `axis_name` is an argument, and `lpa_jax.parallel` maps the step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax

from lpa_jax import injection, metrics
from lpa_jax.injection import Network
from lpa_jax.losses import cross_entropy
from lpa_jax.perturbations import Feedback, Perturbation, Site
from lpa_jax.pgd import check_labels

Array = jax.Array
Batch = Mapping[str, Array]
Loss = Callable[[Array, Array], Array]
Augment = Callable[[Array, Array, Array], Array]
Perturbations = Mapping[str | tuple[str, ...], Perturbation]


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes, and the static objects that change it.

    Attributes:
      step: number of steps taken.
      params: trained parameters.
      model_state: the network's other variables (running statistics).
      opt_state: the optimizer's state.
      perturbation_state: state of the perturbation at each layer.
      rng: the run's key; every random choice is keyed by folding `step` into it.
      network: the network, static.
      optimizer: the optax transformation, static.
      num_classes: C, static.
    """

    step: Array
    params: Any
    model_state: Mapping[str, Any]
    opt_state: optax.OptState
    perturbation_state: Mapping[str, Any]
    rng: Array
    network: Network = flax.struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = flax.struct.field(pytree_node=False)
    num_classes: int = flax.struct.field(pytree_node=False)

    @classmethod
    def create(
        cls,
        model: Any,
        optimizer: optax.GradientTransformation,
        rng: Array,
        example_batch: Batch,
        perturbations: Perturbations | None = None,
    ) -> "TrainState":
        """The state before the first step.

        Args:
          model: a staged model, or a `Network` from `inject` or `CutFunctions`.
          optimizer: an optax transformation.
          rng: a key; parameters and all later randomness come from it.
          example_batch: `{"image": [B, ...], ...}`, only its shapes matter.
          perturbations: layer (or tuple of layers) -> perturbation, as for `lpa_step`.

        Raises:
          ValueError: unknown layer, a layer named twice, or a perturbation that does not fit.

        >>> from lpa_jax.models import MLP
        >>> batch = {"image": jnp.zeros((4, 2, 2, 1)), "label": jnp.zeros(4, jnp.int32)}
        >>> TrainState.create(MLP(num_classes=3), optax.sgd(0.1), jax.random.key(0), batch).step
        Array(0, dtype=int32)
        """
        network = injection.as_network(model)
        plan = _plan(perturbations or {}, network.layers)
        params_rng, run_rng = jax.random.split(rng)
        inputs = example_batch["image"]
        variables = dict(network.init(params_rng, inputs))
        layers = [layer for site in plan for layer in site.layers]
        shapes = injection.activation_shapes(
            network, variables, inputs, (*layers, injection.LOGITS)
        )
        num_classes = shapes[injection.LOGITS].shape[-1]
        params = variables.pop("params")
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=variables,
            opt_state=optimizer.init(params),
            perturbation_state={
                layer: site.perturbation.init(shapes[layer], num_classes)
                for site in plan
                for layer in site.layers
            },
            rng=run_rng,
            network=network,
            optimizer=optimizer,
            num_classes=num_classes,
        )

    @property
    def variables(self) -> dict[str, Any]:
        """Parameters and model state as the network takes them."""
        return {"params": self.params, **self.model_state}


def lpa_step(
    state: TrainState,
    batch: Batch,
    *,
    perturbations: Perturbations | None = None,
    loss: Loss = cross_entropy,
    augment: Augment | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, metrics.Pair]]:
    r"""One optimizer step on the mean of loss(decode_l(h_i + delta_i), t~_i).

    Encode runs once; each perturbation runs what it needs above its layer; the training pass goes
    on from the perturbed activation. Several layers may be perturbed in one pass, from `input` to
    `logits`: a perturbation sees those below it applied and those above it not. No gradient flows
    through a learned perturbation; running statistics are updated once, by the training pass.

    Args:
      state: from `TrainState.create` with the same perturbations.
      batch: `{"image": [B, ...], "label": [B] integers}`; this device's share on a mapped axis.
        `"position"` [B], the examples' places in the global batch, is derived if missing.
      perturbations: layer -> perturbation. A tuple of layers as key means one of them, drawn
        uniformly in every step (as in Manifold Mixup): all are computed, one is used.
      loss: (logits [B, C], targets [B, C]) -> [B].
      augment: (rng, images, positions in the global batch [B]) -> images, on device.
      axis_name: mapped axis over which the global batch is spread, in equal shares, or None.

    Returns:
      The next state, and `loss`, `accuracy` (of the perturbed network) and `gradient_norm` as
      (sum, count) pairs over the global batch.

    Raises:
      ValueError: outside jit, labels outside 0..C-1; always, unknown or repeated layers, or
        one that the state was not created with.
    """
    plan = _plan(perturbations or {}, state.network.layers)
    labels = batch["label"]
    check_labels(labels, state.num_classes)
    _check_states(plan, state)
    keys = _keys(state, axis_name)
    images = batch["image"]
    if augment is not None:
        images = augment(keys.augment, images, _positions(batch, axis_name))

    def objective(params, probes):
        training_pass = _TrainingPass(plan, state, labels, loss, keys, axis_name, probes)
        variables = {"params": params, **state.model_state}
        logits, model_state = injection.forward(
            state.network, variables, images, training_pass.taps(), train=True, rng=keys.dropout
        )
        losses = loss(logits, training_pass.targets)
        record = (losses, logits, model_state, training_pass.states, training_pass.seen)
        return jnp.mean(losses), record

    probes = _probes(plan, state, images)
    (gradient, probe_gradients), record = jax.grad(objective, argnums=(0, 1), has_aux=True)(
        state.params, probes
    )
    losses, logits, model_state, perturbation_state, seen = record
    if axis_name is not None:
        gradient = jax.lax.pmean(gradient, axis_name)
        model_state = _mean_over(axis_name, model_state)
    # Probes see the gradient of the mean over this device's examples; a site wants one an example.
    perturbation_state = _learn(
        plan,
        perturbation_state,
        seen,
        probe_gradients,
        feedback_of=lambda g: Feedback(g * labels.shape[0], jax.lax.stop_gradient(logits)),
        site_of=lambda s: Site(s.activation, s.targets, labels, None, loss, s.rng, axis_name),
    )
    updates, opt_state = state.optimizer.update(gradient, state.opt_state, state.params)
    pairs = {"loss": metrics.mean(losses), "accuracy": metrics.accuracy(logits, labels)}
    pairs = metrics.reduce_over(pairs, axis_name)
    pairs["gradient_norm"] = (optax.tree.norm(gradient), jnp.ones(()))
    new_state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        model_state=model_state,
        opt_state=opt_state,
        perturbation_state=perturbation_state,
    )
    return new_state, pairs


def eval_step(
    state: TrainState,
    batch: Batch,
    *,
    loss: Loss = cross_entropy,
    axis_name: str | None = None,
) -> dict[str, metrics.Pair]:
    """Loss and accuracy of the unperturbed network in evaluation mode.

    Args:
      state: a train state.
      batch: `image`, `label` and, where the batch is padded, `mask` [B]; masked examples count
        nowhere.
      loss: as in `lpa_step`; usually plain cross entropy, so that methods compare.
      axis_name: mapped axis of the global batch or None.

    Returns:
      (sum, count) pairs `loss`, `accuracy` (scalars) and `per_class_accuracy` ([C] each).

    Raises:
      ValueError: outside jit, labels outside 0..C-1.
    """
    labels, mask = batch["label"], batch.get("mask")
    check_labels(labels, state.num_classes)
    logits, _ = state.network.advance(
        state.variables, batch["image"], {}, injection.LOGITS, train=False, rng=None
    )
    losses = loss(logits, jax.nn.one_hot(labels, state.num_classes))
    pairs = {
        "loss": metrics.mean(losses, mask),
        "accuracy": metrics.accuracy(logits, labels, mask),
        "per_class_accuracy": metrics.per_class_accuracy(logits, labels, mask, state.num_classes),
    }
    return metrics.reduce_over(pairs, axis_name)


class _PlannedSite(NamedTuple):
    """A perturbation and its layer, or the layers of which each step draws one."""

    layers: tuple[str, ...]
    perturbation: Perturbation


def _plan(perturbations: Perturbations, layers: Sequence[str]) -> tuple[_PlannedSite, ...]:
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
        plan.append(_PlannedSite(site_layers, perturbation))
    return tuple(plan)


def _check_states(plan: Sequence[_PlannedSite], state: TrainState) -> None:
    created = state.perturbation_state
    for layer in (layer for site in plan for layer in site.layers):
        if layer not in created:
            raise ValueError(
                f"perturbations name layer {layer!r}, but the state was created with those at "
                f"[{', '.join(created)}]"
            )


class _Keys(NamedTuple):
    """Keys of one step; `draw` is equal on all devices."""

    augment: Array
    dropout: Array
    sites: Array
    draw: Array


def _keys(state: TrainState, axis_name: str | None) -> _Keys:
    augment, dropout, sites, draw = jax.random.split(jax.random.fold_in(state.rng, state.step), 4)
    if axis_name is not None:
        device = jax.lax.axis_index(axis_name)
        dropout, sites = jax.random.fold_in(dropout, device), jax.random.fold_in(sites, device)
    return _Keys(augment, dropout, sites, draw)


def _mean_over(axis_name: str, model_state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Running statistics averaged over devices; counters and the like are the same on each."""
    return jax.tree.map(
        lambda v: jax.lax.pmean(v, axis_name) if jnp.issubdtype(v.dtype, jnp.floating) else v,
        model_state,
    )


def _positions(batch: Batch, axis_name: str | None) -> Array:
    """Each example's place in the global batch, which keys its augmentation, [B]."""
    if "position" in batch:
        return batch["position"]
    positions = jnp.arange(batch["label"].shape[0])
    if axis_name is None:
        return positions
    return positions + jax.lax.axis_index(axis_name) * positions.shape[0]


class _Seen(NamedTuple):
    """What a perturbation that learns from the training pass saw in it, and whether it was used."""

    activation: Array
    targets: Array
    rng: Array
    used: Array


class _TrainingPass:
    """What the taps of one training pass share while it walks up the network."""

    def __init__(self, plan, state, labels, loss, keys, axis_name, probes):
        self.targets = jax.nn.one_hot(labels, state.num_classes)
        self.states = dict(state.perturbation_state)
        self.seen: dict[str, _Seen] = {}
        self._plan, self._labels, self._loss = plan, labels, loss
        self._keys, self._axis_name, self._probes = keys, axis_name, probes
        self._depth = {layer: i for i, layer in enumerate(state.network.layers)}

    def taps(self) -> dict[str, injection.Tap]:
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
                activation, self.targets, self._labels, decode, self._loss, rng, self._axis_name
            )
            before = (activation, self.targets, self.states[layer])
            applied = perturbation.apply(self.states[layer], site)
            after = (applied.activation, applied.targets, applied.state)
            if used is not None:
                after = jax.tree.map(lambda new, old: jnp.where(used, new, old), after, before)
            perturbed, self.targets, self.states[layer] = after
            if perturbation.update is None:
                return perturbed
            self.seen[layer] = _Seen(
                activation=jax.lax.stop_gradient(activation),
                targets=before[1],
                rng=rng,
                used=jnp.ones((), bool) if used is None else used,
            )
            return perturbed + self._probes[layer]

        return tap


def _probes(plan: Sequence[_PlannedSite], state: TrainState, images: Array) -> dict[str, Array]:
    """Zeros added at the layers whose perturbation wants the gradient there."""
    layers = [
        layer for site in plan if site.perturbation.update is not None for layer in site.layers
    ]
    shapes = injection.activation_shapes(state.network, state.variables, images, layers)
    return {layer: jnp.zeros(shape.shape, shape.dtype) for layer, shape in shapes.items()}


def _learn(plan, states, seen, probe_gradients, feedback_of, site_of):
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
