"""One training step under perturbations, and one evaluation step: pure functions of `TrainState`.

    encode -> perturb -> decode -> loss -> gradient -> update

The step does not depend on devices: `axis_name` is an argument, and `lpa_jax.parallel` maps it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lpa_jax import injection, metrics
from lpa_jax.checks import check_labels
from lpa_jax.losses import cross_entropy
from lpa_jax.penalties import Observed
from lpa_jax.perturbations import Feedback, Site
from lpa_jax.perturbations.perturbed_pass import PerturbedPass, counted_labels
from lpa_jax.sharding import in_auto_axes
from lpa_jax.tables import weight_of_counted
from lpa_jax.training.state import (
    Batch,
    Penalties,
    Perturbations,
    PlannedSite,
    TrainState,
    check_given,
    check_penalties,
    check_states,
    plan_sites,
)

Array = jax.Array
Loss = Callable[[Array, Array], Array]
Augment = Callable[[Array, Array, Array], Array]


@in_auto_axes(like=lambda state, *args, **kwargs: (state, None))
def lpa_step(
    state: TrainState,
    batch: Batch,
    *,
    perturbations: Perturbations | None = None,
    penalties: Penalties | None = None,
    loss: Loss = cross_entropy,
    augment: Augment | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, metrics.Pair]]:
    r"""One optimizer step on the mean of loss(decode_l(h_i + delta_i), t~_i), plus penalties.

    The network below a perturbed layer runs once; a perturbation runs what it needs above its
    layer; the training pass continues from the perturbed activation. Several layers, from `input`
    to `logits`, may be perturbed in one pass: a perturbation sees those below it applied and those
    above it not. No gradient flows through a learned perturbation. Running statistics are updated
    once, by the training pass. An optimizer that needs gradients at other parameters (`grad_fn`,
    as `optax.contrib.sam` does) gets them for the same batch, keys and perturbation rules.

    Args:
      state: From `TrainState.create` with the same perturbations.
      batch: `{"image": [B, ...], "label": [B] integers}`; this device's share on a mapped axis.
        Examples with label -1 or `"mask"` [B] 0 do not count: they have no loss, no perturbation
        and no part in class means, domains or pairs (but in the statistics of batch normalisation).
        `"position"` [B], the examples' positions in the global batch, is derived if missing.
      perturbations: Layer -> perturbation. With a tuple of layers as key, every step draws one of
        them uniformly (as in Manifold Mixup): all are computed, one is used. A step without them
        on a state that was created with some needs `perturbations={}`; so do `penalties`.
      penalties: Name -> penalty, a scalar added to the objective. Penalties over domains read
        `batch["domain"]`, [B] integers.
      loss: (logits [B, C], targets [B, C]) -> [B].
      augment: (rng, images, positions in the global batch [B]) -> images, on device.
      axis_name: Axis of `jax.pmap` or `jax.shard_map` over which the global batch is spread, in
        equal shares, or None.

    Returns:
      The next state, and `loss`, `accuracy` (of the perturbed network), `gradient_norm` and the
      value of each penalty, `penalty/name`, as (sum, count) pairs over the global batch.

    Raises:
      ValueError: An unknown or repeated layer, one that the state was not created with, or no
        perturbations or penalties for a state that was created with them; outside jit, a label
        outside -1..C-1 (under jit its loss is NaN).
    """
    check_given(perturbations, penalties, state)
    plan, penalties = plan_sites(perturbations or {}, state.network.layers), penalties or {}
    check_penalties(penalties, state.network.layers)
    labels = counted_labels(batch)
    check_labels(labels, state.num_classes, may_ignore=True)
    check_states(plan, penalties, state)
    keys = _step_keys(state, axis_name)
    images = batch["image"]
    if augment is not None:
        images = augment(keys.augment, images, _positions(batch, axis_name))
    batch = {**batch, "image": images, "label": labels}
    objective = _objective(state, batch, plan, penalties, loss, keys, axis_name)
    probes = _probes(plan, state, images)

    def gradient_at(params, *_):
        (gradient, probe_gradients), record = jax.grad(objective, argnums=(0, 1), has_aux=True)(
            *_on_this_device((params, probes), axis_name)
        )
        if axis_name is not None:
            gradient = jax.lax.pmean(gradient, axis_name)
        return gradient, probe_gradients, record

    gradient, probe_gradients, record = gradient_at(state.params)
    model_state = record.model_state
    if axis_name is not None:
        model_state = _mean_over(axis_name, model_state)
    perturbation_state = _learn(plan, record, probe_gradients, batch, loss, axis_name)
    updates, opt_state = optax.with_extra_args_support(state.optimizer).update(
        gradient, state.opt_state, state.params, grad_fn=lambda *at: gradient_at(*at)[0]
    )
    pairs = {
        "loss": metrics.mean(record.losses, labels != -1),
        "accuracy": metrics.accuracy(record.logits, labels, labels != -1),
    }
    pairs = metrics.reduce_over(pairs, axis_name)
    pairs["gradient_norm"] = (optax.tree.norm(gradient), jnp.ones(()))
    for name, value in record.penalties.items():
        pairs[f"penalty/{name}"] = (value, jnp.ones(()))
    new_state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        model_state=model_state,
        opt_state=opt_state,
        perturbation_state=perturbation_state,
        penalty_state=record.penalty_state,
    )
    return new_state, pairs


@in_auto_axes()
def eval_step(
    state: TrainState,
    batch: Batch,
    *,
    loss: Loss = cross_entropy,
    adjust_logits: Callable[[Array], Array] | None = None,
    axis_name: str | None = None,
) -> dict[str, metrics.Pair]:
    """Loss and accuracy of the unperturbed network in evaluation mode.

    Args:
      state: A train state.
      batch: `image`, `label` and, if the batch is padded, `mask` [B]: examples with mask 0 or label
        -1 do not count.
      loss: As in `lpa_step`; usually plain cross entropy, so that methods are comparable.
      adjust_logits: Logits [B, C] -> [B, C] before anything is measured, such as post-hoc logit
        adjustment; None does nothing.
      axis_name: Mapped axis of the global batch or None.

    Returns:
      (sum, count) pairs `loss`, `accuracy` (scalars) and `per_class_accuracy` ([C] each).

    Raises:
      ValueError: Outside jit, a label outside -1..C-1 (under jit its loss is NaN).
    """
    labels = counted_labels(batch)
    check_labels(labels, state.num_classes, may_ignore=True)
    mask = labels != -1
    given = injection.Pass(state.variables, batch["image"])
    logits, _ = state.network.run(given, {}, injection.LOGITS)
    if adjust_logits is not None:
        logits = adjust_logits(logits)
    losses = loss(logits, jax.nn.one_hot(labels, state.num_classes))
    losses = _counted_losses(losses, labels, state.num_classes)
    pairs = {
        "loss": metrics.mean(losses, mask),
        "accuracy": metrics.accuracy(logits, labels, mask),
        "per_class_accuracy": metrics.per_class_accuracy(logits, labels, mask, state.num_classes),
    }
    return metrics.reduce_over(pairs, axis_name)


class _Seen(NamedTuple):
    """What the site of a perturbation that learns held, and whether the perturbation was used."""

    activation: Array
    targets: Array
    rng: Array
    used: Array


class _Record(NamedTuple):
    """Results of a training pass, apart from its gradient."""

    losses: Array
    logits: Array
    model_state: Mapping[str, Any]
    perturbation_state: Mapping[str, Any]
    seen: Mapping[str, _Seen]
    penalties: Mapping[str, Array]
    penalty_state: Mapping[str, Any]


class _StepKeys(NamedTuple):
    """Keys of one step; `augment` and `draw` are equal on all devices."""

    augment: Array
    dropout: Array
    sites: Array
    draw: Array


def _step_keys(state: TrainState, axis_name: str | None) -> _StepKeys:
    augment, dropout, sites, draw = jax.random.split(jax.random.fold_in(state.rng, state.step), 4)
    if axis_name is not None:
        device = jax.lax.axis_index(axis_name)
        dropout, sites = jax.random.fold_in(dropout, device), jax.random.fold_in(sites, device)
    return _StepKeys(augment, dropout, sites, draw)


def _objective(state, batch, plan, penalties, loss, keys, axis_name):
    """(params, probes) -> mean loss plus penalties, and a record of the pass."""

    def objective(params, probes):
        variables = {"params": params, **state.model_state}
        perturbed = PerturbedPass(
            batch, state.num_classes, state.perturbation_state, loss, axis_name
        )
        taps, seen = _perturbing_taps(perturbed, plan, probes, state.network.layers, keys)
        taps, features = _watching_taps(taps, penalties)
        given = injection.Pass(variables, batch["image"], train=True, rng=keys.dropout)
        logits, model_state = injection.run_perturbed(state.network, given, taps)
        losses = _counted_losses(loss(logits, perturbed.targets), batch["label"], logits.shape[-1])

        def decode(layer, activation):
            at = injection.Pass(variables, batch["image"])
            return state.network.run(at, {layer: activation}, injection.LOGITS)[0]

        observed = Observed(
            losses=losses,
            logits=logits,
            targets=perturbed.targets,
            labels=batch["label"],
            domain=batch.get("domain"),
            features=features,
            decode=decode,
            loss=loss,
            step=state.step,
            axis_name=axis_name,
        )
        values, penalty_state = _penalize(penalties, state.penalty_state, observed)
        record = _Record(losses, logits, model_state, perturbed.states, seen, values, penalty_state)
        weight = weight_of_counted(batch["label"], axis_name).astype(losses.dtype)
        return jnp.mean(losses) * weight + sum(values.values()), record

    return objective


def _perturbing_taps(
    perturbed: PerturbedPass,
    plan: Sequence[PlannedSite],
    probes: Mapping[str, Array],
    layers: Sequence[str],
    keys: _StepKeys,
) -> tuple[dict[str, injection.Tap], dict[str, _Seen]]:
    """Layer -> tap that perturbs, and layer -> what these taps record."""
    taps: dict[str, injection.Tap] = {}
    seen: dict[str, _Seen] = {}

    def learning(layer, used):
        def after(site, applied, activation):
            del applied
            seen[layer] = _Seen(
                activation=jax.lax.stop_gradient(site.activation),
                targets=site.targets,
                rng=site.rng,
                used=jnp.ones((), bool) if used is None else used,
            )
            return activation + probes[layer]

        return {"after": after}

    for position, site in enumerate(plan):
        draw = jax.random.fold_in(keys.draw, position)
        drawn = jax.random.randint(draw, (), 0, len(site.layers))
        for i, layer in enumerate(site.layers):
            used = None if len(site.layers) == 1 else drawn == i
            rng = jax.random.fold_in(keys.sites, layers.index(layer))
            extra = learning(layer, used) if site.perturbation.update is not None else {}
            taps[layer] = perturbed.tap(layer, site.perturbation, rng, used, **extra)
    return taps, seen


def _watching_taps(
    taps: Mapping[str, injection.Tap], penalties: Penalties
) -> tuple[dict[str, injection.Tap], dict[str, Array]]:
    """The taps with those that penalties need, and layer -> activation, which these record."""
    features: dict[str, Array] = {}

    def watched(layer, perturb):
        def tap(activation, decode):
            features[layer] = activation if perturb is None else perturb(activation, decode)
            return features[layer]

        return tap

    layers = sorted({layer for penalty in penalties.values() for layer in penalty.layers})
    watching = {layer: watched(layer, taps.get(layer)) for layer in layers}
    return {**taps, **watching}, features


def _probes(plan: Sequence[PlannedSite], state: TrainState, images: Array) -> dict[str, Array]:
    """Zeros, added at the layers of perturbations that learn, to get the gradient there."""
    layers = [
        layer for site in plan if site.perturbation.update is not None for layer in site.layers
    ]
    shapes = injection.activation_shapes(state.network, state.variables, images, layers)
    return {layer: jnp.zeros(shape.shape, shape.dtype) for layer, shape in shapes.items()}


def _learn(
    plan: Sequence[PlannedSite],
    record: _Record,
    probe_gradients: Mapping[str, Array],
    batch: Batch,
    loss: Loss,
    axis_name: str | None,
) -> dict[str, Any]:
    """Hands the gradient of the training pass to the perturbations that learn from it."""
    labels, logits = batch["label"], jax.lax.stop_gradient(record.logits)
    learned = dict(record.perturbation_state)
    updates = {layer: site.perturbation.update for site in plan for layer in site.layers}
    for layer, seen in record.seen.items():
        site = Site(
            activation=seen.activation,
            targets=seen.targets,
            labels=labels,
            decode=None,
            loss=loss,
            rng=seen.rng,
            axis_name=axis_name,
            domain=batch.get("domain"),
        )
        # A probe's gradient is that of the mean over the examples that count, not of each example.
        gradient = probe_gradients[layer]
        examples = labels.shape[0] / weight_of_counted(labels, axis_name)
        feedback = Feedback(gradient * examples.astype(gradient.dtype), logits)
        new = updates[layer](learned[layer], site, feedback)
        learned[layer] = jax.tree.map(
            lambda new, old, used=seen.used: jnp.where(used, new, old), new, learned[layer]
        )
    return learned


def _penalize(
    penalties: Penalties, states: Mapping[str, Any], observed: Observed
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The value of every penalty and its next state, by name."""
    values, new_states = {}, {}
    for name, penalty in penalties.items():
        values[name], state = penalty.apply(states[name], observed)
        new_states[name] = jax.lax.stop_gradient(state)
    return values, new_states


def _on_this_device(tree: Any, axis_name: str | None) -> Any:
    """The arrays as this device's own, so that gradients with respect to them stay its own.

    `jax.shard_map` with its default `check_vma=True` knows which arrays are equal on all devices,
    and sums gradients with respect to those over the devices.
    """

    def varies(leaf):
        kind = jax.typeof(leaf)
        # JAX 0.9 has `vma` where 0.10 has `manual_axis_type.varying`.
        return axis_name in (kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying)

    if axis_name is None or not varies(jax.lax.axis_index(axis_name)):
        return tree  # under pmap, vmap, or shard_map without the check
    return jax.tree.map(
        lambda leaf: leaf if varies(leaf) else jax.lax.pcast(leaf, axis_name, to="varying"), tree
    )


def _counted_losses(losses: Array, labels: Array, num_classes: int) -> Array:
    """Losses [B]: 0 for label -1, NaN for other labels outside 0..C-1, which jit cannot refuse."""
    losses = jnp.where(labels == -1, 0.0, losses)
    return jnp.where((labels >= -1) & (labels < num_classes), losses, jnp.nan)


def _mean_over(axis_name: str, model_state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Running statistics averaged over devices; counters are the same on each."""
    return jax.tree.map(
        lambda v: jax.lax.pmean(v, axis_name) if jnp.issubdtype(v.dtype, jnp.floating) else v,
        model_state,
    )


def _positions(batch: Batch, axis_name: str | None) -> Array:
    """Each example's position in the global batch, [B], which keys its augmentation."""
    if "position" in batch:
        return batch["position"]
    positions = jnp.arange(batch["label"].shape[0])
    if axis_name is None:
        return positions
    return positions + jax.lax.axis_index(axis_name) * positions.shape[0]
