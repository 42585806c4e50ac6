"""One training step under perturbations, and one evaluation step: pure functions over `TrainState`.

    encode -> perturb -> decode -> loss -> gradient -> update

Nothing here knows about devices: `axis_name` is an argument, and `lpa_jax.parallel` maps the step.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lpa_jax import injection, metrics
from lpa_jax.losses import cross_entropy
from lpa_jax.penalties import Observed
from lpa_jax.perturbations import Feedback, Site
from lpa_jax.pgd import check_labels
from lpa_jax.training.plan import Penalties, Perturbations, check_penalties, plan_sites
from lpa_jax.training.state import TrainState
from lpa_jax.training.training_pass import (
    TrainingPass,
    check_states,
    learn,
    penalize,
    probes_for,
    step_keys,
)

Array = jax.Array
Batch = Mapping[str, Array]
Loss = Callable[[Array, Array], Array]
Augment = Callable[[Array, Array, Array], Array]


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

    Encode runs once; each perturbation runs what it needs above its layer; the training pass goes
    on from the perturbed activation. Several layers may be perturbed in one pass, from `input` to
    `logits`: a perturbation sees those below it applied and those above it not. No gradient flows
    through a learned perturbation; running statistics are updated once, by the training pass.
    An optimizer that asks for gradients elsewhere (`grad_fn`: `optax.contrib.sam`) is given them,
    with the same batch, keys and perturbation rules.

    Args:
      state: from `TrainState.create` with the same perturbations.
      batch: `{"image": [B, ...], "label": [B] integers}`; this device's share on a mapped axis.
        `"position"` [B], the examples' places in the global batch, is derived if missing.
      perturbations: layer -> perturbation. A tuple of layers as key means one of them, drawn
        uniformly in every step (as in Manifold Mixup): all are computed, one is used.
      penalties: name -> penalty, scalars added to the objective; those over domains read
        `batch["domain"]`, [B] integers.
      loss: (logits [B, C], targets [B, C]) -> [B].
      augment: (rng, images, positions in the global batch [B]) -> images, on device.
      axis_name: mapped axis over which the global batch is spread, in equal shares, or None.

    Returns:
      The next state, and `loss`, `accuracy` (of the perturbed network), `gradient_norm` and the
      value of each penalty, `penalty/name`, as (sum, count) pairs over the global batch.

    Raises:
      ValueError: outside jit, labels outside 0..C-1; always, unknown or repeated layers, or
        one that the state was not created with.
    """
    plan, penalties = plan_sites(perturbations or {}, state.network.layers), penalties or {}
    check_penalties(penalties, state.network.layers)
    labels = batch["label"]
    check_labels(labels, state.num_classes)
    check_states(plan, penalties, state)
    keys = step_keys(state, axis_name)
    images = batch["image"]
    if augment is not None:
        images = augment(keys.augment, images, _positions(batch, axis_name))
    objective = _objective(
        state, {**batch, "image": images}, plan, penalties, loss, keys, axis_name
    )
    probes = probes_for(plan, state, images)

    def gradient_at(params, *_):
        (gradient, probe_gradients), record = jax.grad(objective, argnums=(0, 1), has_aux=True)(
            params, probes
        )
        if axis_name is not None:
            gradient = jax.lax.pmean(gradient, axis_name)
        return gradient, probe_gradients, record

    gradient, probe_gradients, record = gradient_at(state.params)
    losses, logits, model_state = record["losses"], record["logits"], record["model_state"]
    if axis_name is not None:
        model_state = _mean_over(axis_name, model_state)
    # Probes see the gradient of the mean over this device's examples; a site wants one an example.
    perturbation_state = learn(
        plan,
        record["perturbation_state"],
        record["seen"],
        probe_gradients,
        feedback_of=lambda g: Feedback(g * labels.shape[0], jax.lax.stop_gradient(logits)),
        site_of=lambda s: Site(
            s.activation, s.targets, labels, None, loss, s.rng, axis_name, batch.get("domain")
        ),
    )
    updates, opt_state = optax.with_extra_args_support(state.optimizer).update(
        gradient, state.opt_state, state.params, grad_fn=lambda *at: gradient_at(*at)[0]
    )
    pairs = {"loss": metrics.mean(losses), "accuracy": metrics.accuracy(logits, labels)}
    pairs = metrics.reduce_over(pairs, axis_name)
    pairs["gradient_norm"] = (optax.tree.norm(gradient), jnp.ones(()))
    for name, value in record["penalties"].items():
        pairs[f"penalty/{name}"] = (value, jnp.ones(()))
    new_state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        model_state=model_state,
        opt_state=opt_state,
        perturbation_state=perturbation_state,
        penalty_state=record["penalty_state"],
    )
    return new_state, pairs


def _objective(state, batch, plan, penalties, loss, keys, axis_name):
    """(params, probes) -> mean loss plus penalties, and a record of what the pass saw."""
    images, labels = batch["image"], batch["label"]
    feature_layers = sorted({layer for p in penalties.values() for layer in p.layers})

    def objective(params, probes):
        walk = TrainingPass(plan, state, batch, loss, keys, axis_name, probes, feature_layers)
        variables = {"params": params, **state.model_state}
        logits, model_state = injection.forward(
            state.network, variables, images, walk.taps(), train=True, rng=keys.dropout
        )
        losses = loss(logits, walk.targets)

        def decode(layer, activation):
            pinned = {layer: activation}
            return state.network.advance(
                variables, images, pinned, injection.LOGITS, train=False, rng=None
            )[0]

        observed = Observed(
            losses=losses,
            logits=logits,
            targets=walk.targets,
            labels=labels,
            domain=batch.get("domain"),
            features=walk.features,
            decode=decode,
            loss=loss,
            step=state.step,
            axis_name=axis_name,
        )
        added, penalty_state = penalize(penalties, state.penalty_state, observed)
        record = {
            "losses": losses,
            "logits": logits,
            "model_state": model_state,
            "perturbation_state": walk.states,
            "seen": walk.seen,
            "penalties": added,
            "penalty_state": penalty_state,
        }
        return jnp.mean(losses) + sum(added.values()), record

    return objective


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
      state: a train state.
      batch: `image`, `label` and, where the batch is padded, `mask` [B]; masked examples count
        nowhere.
      loss: as in `lpa_step`; usually plain cross entropy, so that methods compare.
      adjust_logits: logits [B, C] -> [B, C] before anything is measured, such as post-hoc logit
        adjustment; None leaves them.
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
    if adjust_logits is not None:
        logits = adjust_logits(logits)
    losses = loss(logits, jax.nn.one_hot(labels, state.num_classes))
    pairs = {
        "loss": metrics.mean(losses, mask),
        "accuracy": metrics.accuracy(logits, labels, mask),
        "per_class_accuracy": metrics.per_class_accuracy(logits, labels, mask, state.num_classes),
    }
    return metrics.reduce_over(pairs, axis_name)


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
