"""One training step under perturbations, and one evaluation step: pure functions of `TrainState`.

    encode -> perturb -> decode -> loss -> gradient -> update

The step does not depend on devices: `axis_name` is an argument, and `lpa_jax.parallel` maps it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lpa_jax import checks, injection, metrics
from lpa_jax.labels import Labels
from lpa_jax.losses import cross_entropy
from lpa_jax.losses.base import check_fits
from lpa_jax.parallel.explicit_axes import AxisName, in_auto_axes, on_this_device
from lpa_jax.penalties import Observed
from lpa_jax.perturbations.perturbed_pass import by_row
from lpa_jax.training.forward import (
    Forward,
    Loss,
    batch_labels,
    learned_states,
    perturbed_forward,
    step_keys,
    zero_probes,
)
from lpa_jax.training.optimizer_update import optimizer_update
from lpa_jax.training.state import (
    Batch,
    Penalties,
    Perturbations,
    TrainState,
    check_given,
    check_penalties,
    check_states,
    plan_sites,
)

Array = jax.Array
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
    axis_name: AxisName = None,
) -> tuple[TrainState, dict[str, metrics.Pair]]:
    r"""One optimizer step on the mean of loss(decode_l(h_i + delta_i), t~_i), plus penalties.

    The network below a perturbed layer runs once; a perturbation runs what it needs above its
    layer; the training pass continues from the perturbed activation. Several layers, from `input`
    to `logits`, may be perturbed in one pass: a perturbation sees those below it applied and those
    above it not. No gradient flows through a learned perturbation. Running statistics are updated
    once, by the training pass. The optimizer gets what it may need besides the gradient, for the
    same batch, keys and perturbation rules: `value` (`optax.contrib.reduce_on_plateau`), `grad` and
    `value_fn` (`optax.lbfgs`), `obj_fn` and `grad_fn` (`optax.contrib.sam`).

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
      axis_name: Axis of `jax.pmap` or `jax.shard_map` (or a tuple of its axes) over which the
        global batch is spread, in equal shares, or None.

    Returns:
      The next state, and `loss`, `accuracy` (of the perturbed network), `gradient_norm` and the
      value of each penalty, `penalty/name`, as (sum, count) pairs over the global batch.

    Raises:
      ValueError: An unknown or repeated layer, one that the state was not created with, or no
        perturbations or penalties for a state that was created with them; outside jit, a label
        outside -1..C-1 (under jit its loss is NaN).
    """
    check_given(perturbations, penalties, state)
    batch = injection.read_batch(state.network, batch)
    perturbations, penalties = perturbations or {}, penalties or {}
    plan = plan_sites(perturbations, state.network.layers)
    check_penalties(penalties, state.network.layers)
    check_states(plan, penalties, state)
    # Before anything is computed: inside the objective the same check would be made too late.
    labels = batch_labels(state.network, state.variables, batch, state.num_classes)
    check_penalty_labels(penalties, labels)
    rng = jax.random.fold_in(state.rng, state.step)
    if augment is not None:
        checks.function("augment", augment, "rng", "images", "positions")
        images = augment(step_keys(rng, None)[0], batch["image"], _positions(batch, axis_name))
        batch = {**batch, "image": images}
    objective = _objective(state, batch, perturbations, penalties, loss, rng, axis_name)
    probes = zero_probes(perturbations, state.network, state.variables, batch)

    def gradient_at(params, *_):
        (gradient, probe_gradients), record = jax.grad(objective, argnums=(0, 1), has_aux=True)(
            *on_this_device((params, probes), axis_name)
        )
        if axis_name is not None:
            gradient = jax.lax.pmean(gradient, axis_name)
        return gradient, probe_gradients, record

    gradient, probe_gradients, record = gradient_at(state.params)
    forward = record.forward
    model_state = forward.model_state
    if axis_name is not None:
        model_state = _mean_over(axis_name, model_state)
    perturbation_state = learned_states(
        perturbations, forward, probe_gradients, loss=loss, axis_name=axis_name
    )
    pairs = _measured(record.losses, forward.logits, forward.labels)
    pairs = metrics.reduce_over(pairs, axis_name)
    loss_sum, count = pairs["loss"]
    updates, opt_state = optimizer_update(
        state,
        gradient,
        value=loss_sum / jnp.maximum(count, 1) + sum(record.penalties.values()),
        value_at=lambda params: objective(*on_this_device((params, probes), axis_name))[0],
        gradient_at=lambda *at: gradient_at(*at)[0],
        axis_name=axis_name,
    )
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
    axis_name: AxisName = None,
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
    checks.instance("state", state, TrainState, "a TrainState")
    batch = injection.read_batch(state.network, batch)
    labels = batch_labels(state.network, state.variables, batch, state.num_classes)
    check_fits(loss, labels.several)
    given = injection.Pass(state.variables, batch["image"])
    logits, _ = state.network.run(given, {}, injection.LOGITS)
    if adjust_logits is not None:
        checks.function("adjust_logits", adjust_logits, "logits")
        logits = adjust_logits(logits)
    targets = jnp.reshape(labels.targets, logits.shape)
    losses = labels.counted(loss(logits, targets))
    rows, num_classes = labels.rows, state.num_classes
    pairs = _measured(losses, logits, labels)
    logits = jnp.reshape(logits, (-1, num_classes))
    if labels.several:
        pairs |= metrics.several_classes(logits, rows)
    else:
        pairs["per_class_accuracy"] = metrics.per_class_accuracy(
            logits, rows, rows != -1, num_classes
        )
    return metrics.reduce_over(pairs, axis_name)


def _measured(losses: Array, logits: Array, labels: Labels) -> dict[str, metrics.Pair]:
    """Loss and accuracy over the labels that count."""
    rows, logits = labels.rows, jnp.reshape(logits, (-1, labels.num_classes))
    mask = rows != -1  # not rows >= 0: the loss of any other bad label is NaN
    if labels.several:
        accuracy, mask = metrics.accuracy_of_several(logits, rows), jnp.any(mask, axis=1)
    else:
        accuracy = metrics.accuracy(logits, rows, mask)
    return {"loss": metrics.mean(losses, mask), "accuracy": accuracy}


class _Record(NamedTuple):
    """Results of a training pass, apart from its gradient."""

    forward: Forward
    losses: Array
    penalties: Mapping[str, Array]
    penalty_state: Mapping[str, Any]


def _objective(state, batch, perturbations, penalties, loss, rng, axis_name):
    """(params, probes) -> mean loss plus penalties, and a record of the pass."""
    watch = sorted({layer for penalty in penalties.values() for layer in penalty.layers})
    sown = sorted({name for penalty in penalties.values() for name in penalty.sown})

    def objective(params, probes):
        variables = {"params": params, **state.model_state}
        forward = perturbed_forward(
            perturbations,
            state.perturbation_state,
            state.network,
            variables,
            batch,
            rng=rng,
            loss=loss,
            axis_name=axis_name,
            probes=probes,
            watch=watch,
            sown=sown,
            num_classes=state.num_classes,
        )
        labels = forward.labels
        losses = labels.counted(loss(forward.logits, forward.targets))

        def decode(layer, activation):
            at = injection.Pass(variables, batch["image"])
            return state.network.run(at, {layer: activation}, injection.LOGITS)[0]

        observed = Observed(
            losses=losses,
            logits=jnp.reshape(forward.logits, (-1, labels.num_classes)),
            targets=jnp.reshape(forward.targets, (-1, labels.num_classes)),
            labels=labels.rows,
            domain=by_row(batch.get("domain"), labels),
            features=forward.features,
            decode=decode,
            loss=loss,
            step=state.step,
            axis_name=axis_name,
            sown=forward.sown,
        )
        values, penalty_state = _penalize(penalties, state.penalty_state, observed)
        total = labels.mean(losses, axis_name) + sum(values.values())
        return total, _Record(forward, losses, values, penalty_state)

    return objective


def check_penalty_labels(penalties: Penalties, labels: Labels) -> None:
    """Raises ValueError for labels of positions or of several classes that a penalty cannot use."""
    for name, penalty in penalties.items():
        plain = len(labels.lead) == 1 and not labels.several
        if penalty.layers and not plain:
            raise ValueError(
                f"penalties[{name!r}] reads features and needs one label an example, [B], got "
                f"labels of shape {labels.values.shape}"
            )


def _penalize(
    penalties: Penalties, states: Mapping[str, Any], observed: Observed
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The value of every penalty and its next state, by name."""
    values, new_states = {}, {}
    for name, penalty in penalties.items():
        values[name], state = penalty.apply(states[name], observed)
        new_states[name] = jax.lax.stop_gradient(state)
    return values, new_states


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
