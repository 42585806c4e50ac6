"""What a perturbation does to one batch, by sign group and class: loss, norm, logits, direction.

These numbers test the paper's conjecture: an expansive perturbation (norm up) augments positively
(loss up), a contractive one (norm down) negatively (loss down). All results are (sum, count) pairs
of `lpa_jax.metrics`, so they can be added over batches.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lpa_jax import checks, injection, metrics, tables
from lpa_jax.labels import Labels, counted_labels
from lpa_jax.losses import cross_entropy
from lpa_jax.losses.base import check_fits
from lpa_jax.parallel.explicit_axes import in_auto_axes
from lpa_jax.perturbations import Perturbation
from lpa_jax.perturbations.base import Site, check_perturbations
from lpa_jax.perturbations.perturbed_pass import PerturbedPass, initial_state

Array = jax.Array
Loss = Callable[[Array, Array], Array]
GROUPS = {"positive": 1.0, "negative": -1.0, "neutral": 0.0}


class Observation(NamedTuple):
    """One layer in one perturbed pass.

    Attributes:
      before, after: h_i and h~_i, [B, *S], in at least float32.
      loss_before: loss(decode(h_i), t_i), [B], with the targets that this layer received.
      loss_after: loss(decode(h~_i), t~_i), [B].
      sign, radius: s_c and eps_c, [C], or None if the method has none.
      correct_before: Whether decode(h_i) ranks the label first, [B]; None if an example has several
        classes, or if it was not recorded.
      correct_after: Whether decode(h~_i) does, [B], or None.
      logits_before, logits_after: decode(h_i) and decode(h~_i), [B, C], or None if they were not
        recorded.
    """

    before: Array
    after: Array
    loss_before: Array
    loss_after: Array
    sign: Array | None
    radius: Array | None
    correct_before: Array | None = None
    correct_after: Array | None = None
    logits_before: Array | None = None
    logits_after: Array | None = None

    @property
    def delta(self) -> Array:
        """h~_i - h_i, [B, *S]."""
        return self.after - self.before


@in_auto_axes()
def observe(
    network: injection.Network,
    variables: injection.Variables,
    batch: Mapping[str, Any],
    perturbations: Mapping[str, Perturbation],
    *,
    rng: Array,
    states: Mapping[str, Any] | None = None,
    loss: Loss = cross_entropy,
    train: bool = False,
    axis_name: str | None = None,
) -> dict[str, Observation]:
    """Runs one perturbed pass and records it at every perturbed layer.

    A perturbation sees those below it applied and those above it not, as in training. Works for
    every method and mode, on networks that were trained with it and on other networks.

    Args:
      network: A cut network.
      variables: Its parameters and model state, which do not change.
      batch: `{"image": [B, ...], "label": [B]}`. With labels of positions, the rows of an
        observation are the positions.
      perturbations: Layer -> perturbation, one layer each.
      rng: Key for dropout and random perturbations.
      states: Layer -> perturbation state, as in `TrainState.perturbation_state`; None is the
        initial state (a carried delta is then zero: use `mode="cold"` to measure LPA without one).
      loss: (logits [B, C], targets [B, C]) -> [B].
      train: Training mode (dropout, batch statistics) instead of evaluation mode.
      axis_name: Mapped axis of the global batch, as for `lpa_step`, or None. A model with
        `BatchNorm(axis_name=...)` needs it in training mode, on one device under
        `jax.vmap(..., axis_name=...)`.

    Returns:
      layer -> observation, of this device's share of the batch.

    Raises:
      ValueError: Unknown layer, or an empty batch.

    Example:
      >>> network = injection.CutFunctions(lambda p, x: x, lambda p, h: h @ p)
      >>> batch = {"image": jnp.ones((2, 3)), "label": jnp.array([0, 1])}
      >>> from lpa_jax.perturbations import stateless
      >>> double = stateless("double", lambda site: (2 * site.activation, site.targets))
      >>> seen = observe(network, {"params": jnp.eye(3)}, batch, {"hidden": double},
      ...                rng=jax.random.key(0))
      >>> seen["hidden"].delta.tolist()
      [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    network = injection.as_network(network)
    checks.key("rng", rng)
    check_perturbations(perturbations)
    batch = injection.read_batch(network, batch)
    inputs = batch["image"]
    if not batch["label"].shape[0]:
        raise ValueError("batch must hold at least one example, got none")
    shapes = injection.activation_shapes(
        network, variables, inputs, (*perturbations, injection.LOGITS)
    )
    labels = Labels.of(batch, shapes[injection.LOGITS])
    check_fits(loss, labels.several)
    if states is None:
        states = {
            layer: initial_state(layer, perturbation, shapes[layer], labels)
            for layer, perturbation in perturbations.items()
        }
    if axis_name is not None:
        rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
    dropout_rng, sites_rng = jax.random.split(rng)
    perturbed = PerturbedPass(labels, states, loss, axis_name, batch.get("domain"))
    seen: dict[str, Observation] = {}

    def recording(layer):
        def record(site, applied, activation):
            loss_before, logits_before = site.losses_and_logits(site.activation)
            logits_after = site.decode(applied.activation)
            seen[layer] = Observation(
                before=tables.at_least_float32(site.activation),
                after=tables.at_least_float32(applied.activation),
                loss_before=loss_before,
                loss_after=loss(logits_after, applied.targets),
                sign=_stated(applied.aux, "sign"),
                radius=_stated(applied.aux, "radius"),
                correct_before=_correct(site, logits_before),
                correct_after=_correct(site, logits_after),
                logits_before=tables.at_least_float32(logits_before),
                logits_after=tables.at_least_float32(logits_after),
            )
            return activation

        return record

    taps = {}
    for depth, (layer, perturbation) in enumerate(perturbations.items()):
        site_rng = jax.random.fold_in(sites_rng, depth)
        taps[layer] = perturbed.tap(layer, perturbation, site_rng, after=recording(layer))
    given = injection.Pass(variables, inputs, train, dropout_rng)
    injection.run_perturbed(network, given, taps)
    return seen


@in_auto_axes()
def perturbation_effect(
    network: injection.Network,
    variables: injection.Variables,
    states: Mapping[str, Any],
    batch: Mapping[str, Any],
    *,
    perturbations: Mapping[str, Perturbation],
    loss: Loss,
    rng: Array,
    axis_name: str | None = None,
) -> dict[str, metrics.Pair]:
    r"""Changes of loss, accuracy and norm that each perturbation causes, by sign of the class.

        loss_change     = loss(decode(h~_i), t~_i) - loss(decode(h_i), t_i)
        accuracy_change = 1[argmax decode(h~_i) = y_i] - 1[argmax decode(h_i) = y_i]
        norm_ratio      = ||h~_i|| / ||h_i||

    A perturbation depends on the label, so that a network can learn to read the label from it. Then
    `accuracy_change` is large, and accuracy without the perturbation low.

    The same radius has different effects at different layers, models and augmentations; the loss
    change that it causes is comparable between them. Costs two forward passes above each perturbed
    layer and works for every method and mode. Classes are grouped by the sign that an assignment
    gave them: `positive`, `negative`, or `neutral` (no sign, or a method without signs). Measured
    in training mode, in which the perturbation is applied.

    Args:
      network: A cut network.
      variables: Its parameters and model state, which do not change.
      states: Layer -> perturbation state, as in `TrainState.perturbation_state`.
      batch: `{"image": [B, ...], "label": [B]}`.
      perturbations: Layer -> perturbation, one layer each.
      loss: (logits, targets) -> [B].
      rng: Key for dropout and random perturbations.
      axis_name: Mapped axis of the global batch, or None.

    Returns:
      (sum, count) pairs over the global batch, named `layer/loss_change/group`,
      `layer/norm_ratio/group`, `layer/accuracy_change/group` unless examples have several classes,
      and, of methods that have one, `layer/radius/group` (in units of the activation).
    """
    batch = injection.read_batch(network, batch)
    seen = observe(
        network,
        variables,
        batch,
        perturbations,
        rng=rng,
        states=states,
        loss=loss,
        train=True,
        axis_name=axis_name,
    )
    labels = jnp.reshape(counted_labels(batch), -1)
    pairs: dict[str, metrics.Pair] = {}
    for layer, observation in seen.items():
        rows = observation.before.shape[:1]
        if rows != labels.shape or rows != observation.loss_before.shape:
            raise ValueError(
                f"batch['label'] must be one label for each row of {layer!r}, {rows}, got shape "
                f"{jnp.shape(batch['label'])}"
            )
        everywhere = labels >= 0
        values = {
            "loss_change": (observation.loss_after - observation.loss_before, everywhere),
            "norm_ratio": _norm_ratio(observation),
        }
        if observation.correct_before is not None:
            gained = observation.correct_after.astype(jnp.float32) - observation.correct_before
            values["accuracy_change"] = (gained, everywhere)
        if observation.radius is not None:
            values["radius"] = (observation.radius[labels], everywhere)
        sign = jnp.zeros(labels.shape)
        if observation.sign is not None:
            sign = observation.sign[labels]
        for name, (value, known) in values.items():
            for group, wanted in GROUPS.items():
                pairs[f"{layer}/{name}/{group}"] = metrics.mean(
                    value, known & everywhere & (sign == wanted)
                )
    return metrics.reduce_over(pairs, axis_name)


@in_auto_axes()
def class_geometry(
    observation: Observation, labels: Array, num_classes: int, mask: Array | None = None
) -> dict[str, metrics.Pair]:
    r"""What a perturbation does to every class at one layer.

        norm_ratio  = mean_{i in B_c} ||h~_i|| / ||h_i||
        cosine      = mean_{i in B_c} <delta_i, hbar_c> / (||delta_i|| ||hbar_c||),
        delta_norm  = mean_{i in B_c} ||delta_i||,    delta_i = h~_i - h_i
        loss_change = mean_{i in B_c} loss(h~_i) - loss(h_i)
        sign, radius = s_c and eps_c as the method used them

    with hbar_c the mean of h_i over the class's members in this batch. If the observation has the
    logits z_i of one label an example, also

        log_odds_change = mean_{i in B_c} log_odds(z~_i) - log_odds(z_i)
        shared_shift    = ||mean_{i in B_c} d_i||^2 / mean_{i in B_c} ||d_i||^2
        lpl_cosine      = cos(mean_{i in B_c} d_i, mean_{i in B_c} softmax(z_i) - e_c)

    with log_odds(z) = log(p_c / (1 - p_c)) and d_i the shift of the logits z~_i - z_i less its mean
    over the C logits, which softmax ignores. `shared_shift` tells how far a perturbation of an
    activation acts as one of logits does, by the same shift for all members of a class (1), or on
    each example in its own way, as an augmentation does (0, or 1 / |B_c| for independent shifts).
    `lpl_cosine` compares that shift with the gradient that LPL ascends.

    Args:
      observation: From `observe`, or made from activations and losses before and after.
      labels: y_i, [B]; -1 for examples that do not count.
      num_classes: C.
      mask: 0 for padding, [B]; None counts every example.

    Returns:
      (sum, count) pairs of vectors [C]. The count is 0 for absent classes, for `sign` and `radius`
      of a method without them; examples with h_i = 0 (`norm_ratio`) and with delta_i or hbar_c
      zero (`cosine`) are not counted, nor classes whose logits did not move (`shared_shift`,
      `lpl_cosine`). `metrics.compute` turns a count of 0 into nan.

    Raises:
      ValueError: Activations, losses, labels and mask that do not fit together, or (unless traced)
        a loss that is not finite.

    Example:
      >>> h = jnp.array([[3.0, 4.0], [1.0, 0.0]])
      >>> grown = Observation(h, 2 * h, jnp.zeros(2), jnp.ones(2), None, None)
      >>> values = metrics.compute(class_geometry(grown, jnp.array([0, 1]), num_classes=3))
      >>> print(values["norm_ratio"], values["delta_norm"], values["cosine"].round(3))
      [ 2.  2. nan] [ 5.  1. nan] [ 1.  1. nan]
    """
    checks.instance("observation", observation, Observation, "one layer's Observation")
    num_classes = checks.integer("num_classes", num_classes, 1)
    labels = checks.array("labels", labels)
    checks.check_labels(labels, num_classes, may_ignore=True)
    _check_rows(observation, labels, mask)
    mask = jnp.ones(labels.shape) if mask is None else jnp.asarray(mask)
    weight = ((mask != 0) & (labels >= 0)).astype(observation.before.dtype)
    _check_finite(observation, weight)
    counts = tables.class_sums(weight, labels, num_classes)
    member_sums = tables.class_sums(
        observation.before * tables.over_classes(weight, observation.before), labels, num_classes
    )
    # Only the direction is needed: that of the members' sum is that of their mean.
    mean_direction = tables.unit_rows(member_sums)[labels]
    direction = tables.unit_rows(observation.delta)
    moved = (
        weight * (tables.row_norms(observation.delta) > 0) * (tables.row_norms(mean_direction) > 0)
    )

    def pair(values, weight=weight):
        total = tables.class_sums(jnp.where(weight != 0, values, 0.0), labels, num_classes)
        return total, tables.class_sums(weight, labels, num_classes)

    def stated(values):
        if values is None:
            return jnp.zeros(num_classes), jnp.zeros(num_classes)
        return values * counts, counts

    norm_ratio, known = _norm_ratio(observation)
    found = {
        "norm_ratio": pair(norm_ratio, weight * known),
        "cosine": pair(tables.inner_products(direction, mean_direction), moved),
        "delta_norm": pair(tables.row_norms(observation.delta)),
        "loss_change": pair(observation.loss_after - observation.loss_before),
        "sign": stated(observation.sign),
        "radius": stated(observation.radius),
    }
    logits = observation.logits_before
    if logits is not None and logits.shape == (*labels.shape, num_classes):
        counted = jnp.where(weight != 0, labels, -1)
        found |= _logit_shift(logits, observation.logits_after, counted, counts)
    return found


def _logit_shift(
    before: Array, after: Array, labels: Array, counts: Array
) -> dict[str, metrics.Pair]:
    """What `class_geometry` says about the shift of the logits [B, C]; -1 labels do not count."""

    def mean(rows):
        return tables.class_means(rows, labels, counts)

    shift = after - before
    shift -= jnp.mean(shift, axis=1, keepdims=True)
    mean_shift, mean_square = mean(shift), mean(jnp.sum(shift**2, axis=1))
    moved = counts * (mean_square > 0)
    shared = jnp.sum(mean_shift**2, axis=1) / jnp.where(mean_square > 0, mean_square, 1.0)
    gradient = mean(jax.nn.softmax(before) - jax.nn.one_hot(labels, before.shape[1]))
    cosine = tables.inner_products(tables.unit_rows(mean_shift), tables.unit_rows(gradient))
    change = _log_odds(after, labels) - _log_odds(before, labels)
    return {
        "log_odds_change": (tables.class_sums(change, labels, counts.shape[0]), counts),
        "shared_shift": (shared * moved, moved),
        "lpl_cosine": (cosine * moved, moved),
    }


def _log_odds(logits: Array, labels: Array) -> Array:
    """log(p / (1 - p)) of the label, [B]."""
    own = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
    label = jnp.sum(jnp.where(own, logits, 0.0), axis=1)
    return label - jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits), axis=1)


class Agreement(NamedTuple):
    """How often expansive is positive and contractive negative, over the perturbed classes.

    Attributes:
      classes: Number of classes whose activation the perturbation changed.
      loss_and_norm: Share of them whose loss and norm changed in the same direction.
      sign_and_loss: Share of the signed classes whose loss changed in the direction of their sign.
      sign_and_norm: Share of the signed classes whose norm changed in the direction of their sign.
      correlation: Pearson correlation of loss change and norm ratio over these classes, nan if one
        of them is constant.
    """

    classes: int
    loss_and_norm: float
    sign_and_loss: float
    sign_and_norm: float
    correlation: float


def agreement(geometry: Mapping[str, np.ndarray]) -> Agreement:
    """Compares the directions in which loss and norm changed, class by class, on the host.

    Args:
      geometry: `metrics.compute(class_geometry(...))`: vectors [C] with nan for absent classes.

    Raises:
      ValueError: Fewer than two classes were perturbed.

    Example:
      >>> moved = {"norm_ratio": np.array([1.1, 0.9, 0.8]), "sign": np.array([1.0, -1.0, 1.0]),
      ...          "loss_change": np.array([0.2, -0.1, 0.3]), "delta_norm": np.ones(3)}
      >>> agreement(moved)[:4]
      (3, 0.6666666666666666, 1.0, 0.6666666666666666)
    """
    moved = np.nan_to_num(geometry["delta_norm"]) > 0
    if moved.sum() < 2:
        raise ValueError(
            f"agreement compares classes and needs at least 2 that are perturbed, got {moved.sum()}"
        )
    loss_change, sign = geometry["loss_change"][moved], geometry["sign"][moved]
    growth = geometry["norm_ratio"][moved] - 1.0
    signed = np.nan_to_num(sign) != 0

    def share(a, b, among):
        same = np.sign(a[among]) == np.sign(b[among])
        return float(same.mean()) if same.size else float("nan")

    varies = loss_change.std() > 0 and growth.std() > 0
    return Agreement(
        classes=int(moved.sum()),
        loss_and_norm=share(loss_change, growth, np.ones_like(signed)),
        sign_and_loss=share(sign, loss_change, signed),
        sign_and_norm=share(sign, growth, signed),
        correlation=float(np.corrcoef(loss_change, growth)[0, 1]) if varies else float("nan"),
    )


def _correct(site: Site, logits: Array) -> Array | None:
    """Whether the logits rank the label first, in the shape of the labels."""
    if site.several:
        return None
    labels = site.labels if site.output_labels is None else site.output_labels
    return jnp.argmax(logits, axis=-1) == labels


def _stated(aux: Mapping[str, Array], name: str) -> Array | None:
    """A diagnostic of a perturbation; in a chain, that of the first which has it."""
    return next((value for key, value in aux.items() if key.split("/")[-1] == name), None)


def _norm_ratio(observation: Observation) -> tuple[Array, Array]:
    """||h + delta|| / ||h||, [B], and where it is defined: where h is not zero."""
    norms = tables.row_norms(observation.before)
    return tables.row_norms(observation.after) / jnp.where(norms > 0, norms, 1.0), norms > 0


def _check_finite(observation: Observation, weight: Array) -> None:
    """Traced losses have no values to check."""
    for name in ("loss_before", "loss_after"):
        losses = getattr(observation, name)
        if not any(isinstance(value, jax.core.Tracer) for value in (losses, weight)):
            counted = np.asarray(losses)[np.asarray(weight) != 0]
            if not np.isfinite(counted).all():
                worst = counted[~np.isfinite(counted)][0]
                raise ValueError(f"{name} must be finite, got {worst}")


def _check_rows(observation: Observation, labels: Array, mask: Array | None) -> None:
    batch_size = labels.shape[0] if labels.ndim == 1 else None
    if not batch_size:
        raise ValueError(f"labels must be a non-empty vector [B], got shape {labels.shape}")
    if observation.before.shape != observation.after.shape:
        raise ValueError(
            "activations before and after must have one shape, got "
            f"{observation.before.shape} and {observation.after.shape}"
        )
    rows = {
        "before": observation.before,
        "loss_before": observation.loss_before,
        "loss_after": observation.loss_after,
    }
    if mask is not None:
        rows["mask"] = mask
    for name, values in rows.items():
        if jnp.shape(values)[:1] != (batch_size,):
            raise ValueError(
                f"{name} must have one row for each of {batch_size} labels, "
                f"got shape {jnp.shape(values)}"
            )
