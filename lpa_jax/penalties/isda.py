"""ISDA: deep features augmented along the covariance of their class, in closed form."""

import jax
import jax.numpy as jnp

from lpa_jax import checks, tables
from lpa_jax.penalties.base import Observed, Penalty, register
from lpa_jax.penalties.common import batch_mean, check_vectors, scatter_matrices, zero

Array = jax.Array
State = dict[str, Array]


@register("isda")
def isda(layer: str, total_steps: int, strength: float = 0.5, diagonal: bool = False) -> Penalty:
    r"""Implicit semantic data augmentation: a bound of the loss of endlessly augmented features.

        z'_ij   = z_ij + lambda / 2 (w_j - w_{y_i})^T Sigma_{y_i} (w_j - w_{y_i}),
        lambda  = strength min(step / total_steps, 1),
        penalty = mean_i loss(z'_i, t_i) - mean_i loss_i,

    so that the objective is the mean loss of the augmented logits z', an upper bound of the
    expected cross entropy under h_i + N(0, lambda Sigma_{y_i}). `loss` is the run's training loss:
    with cross entropy this is ISDA, with a logit-adjusted loss ISDA on top of it. w_j is column j
    of the linear head above `layer` (read off `decode`), through which gradients flow; none flow
    through Sigma.

    Sigma_c, the covariance (over n, not n - 1) of class c's features so far, this batch included:

        n <- n + m,    mu <- mu + m/n (mu' - mu),
        Sigma <- (1 - m/n) Sigma + m/n Sigma' + m/n (1 - m/n) (mu' - mu)(mu' - mu)^T

    for m examples of the class in the global batch with mean mu' and covariance Sigma', n being the
    new count: exactly the statistics of all features as they were when they were seen. A class that
    is absent from the batch keeps its own. The state is `count` [C], `mean` [C, F] and `covariance`
    [C, F, F] ([C, F] if diagonal), summed over devices in every step.

    Targets that a mixing method has softened keep their weights in the loss, but w_{y_i} and
    Sigma_{y_i} are those of the unmixed label: the bound holds for one-hot targets only.

    Args:
      layer: The layer that feeds the linear head, vectors [B, F].
      total_steps: T >= 1, steps of the whole training, over which lambda grows.
      strength: lambda_0, >= 0. 0 is no penalty.
      diagonal: Keep the variances only, as the publication does for ImageNet: C F numbers, not
        C F^2.

    Raises:
      ValueError: An option out of range; from `init`, features that are not vectors.

    Example:
      >>> penalty = isda(layer="pool", total_steps=1000)
      >>> shapes = {"pool": jax.ShapeDtypeStruct((32, 64), jnp.float32)}
      >>> state = penalty.init(shapes, num_classes=10)
      >>> state["covariance"].shape
      (10, 64, 64)

    References:
      Wang et al., NeurIPS 2019 (arXiv 1909.12220), equations of the loss bound and of the
      online covariance; lambda grows by steps, in the released code by epochs.
    """
    checks.integer("total_steps", total_steps, 1)
    checks.number("strength", strength)
    if checks.vanishes(strength):
        return zero("isda")

    def init(shapes, num_classes):
        check_vectors("isda", layer, shapes[layer])
        width = shapes[layer].shape[1]
        spread = (width,) if diagonal else (width, width)
        return {
            "count": jnp.zeros(num_classes, jnp.float32),
            "mean": jnp.zeros((num_classes, width), jnp.float32),
            "covariance": jnp.zeros((num_classes, *spread), jnp.float32),
        }

    def apply(state, observed):
        state = _observe(state, observed, layer)
        weights = _head_weights(observed, layer)
        ratio = strength * jnp.minimum(observed.step / total_steps, 1.0)
        distances = _distances(weights, observed.labels, state["covariance"])
        augmented = observed.logits + 0.5 * ratio * distances
        losses = observed.loss(augmented, observed.targets)
        return batch_mean(observed, losses) - batch_mean(observed, observed.losses), state

    return Penalty("isda", (layer,), init, apply)


def _observe(state: State, observed: Observed, layer: str) -> State:
    """The statistics of every class with this batch's examples added."""
    labels, axis_name = observed.labels, observed.axis_name
    features = jax.lax.stop_gradient(observed.features[layer]).astype(state["mean"].dtype)
    counts = tables.class_counts(labels, state["count"].shape[0], axis_name)
    means = tables.class_means(features, labels, counts, axis_name)
    centred = features - means[labels]
    shift = means - state["mean"]
    if state["covariance"].ndim == 2:
        covariance = tables.class_means(centred**2, labels, counts, axis_name)
        between = shift**2
    else:
        scatter = scatter_matrices(centred, labels, counts.shape[0], axis_name)
        covariance = scatter / tables.over_classes(jnp.maximum(counts, 1.0), scatter)
        between = shift[:, :, None] * shift[:, None, :]
    total = state["count"] + counts
    share = counts / jnp.maximum(total, 1.0)  # of this batch in what is known of the class
    wide = tables.over_classes(share, covariance)
    return {
        "count": total,
        "mean": state["mean"] + share[:, None] * shift,
        "covariance": (1 - wide) * state["covariance"]
        + wide * covariance
        + wide * (1 - wide) * between,
    }


def _head_weights(observed: Observed, layer: str) -> Array:
    """W [F, C] of the linear head above `layer`: its answers to the unit vectors, less the bias."""
    features = observed.features[layer]
    width = features.shape[1]
    probes = jnp.concatenate([jnp.zeros((1, width)), jnp.eye(width)]).astype(features.dtype)
    answers = observed.decode(layer, probes)
    answers = tables.at_least_float32(answers)
    return answers[1:] - answers[:1]


def _distances(weights: Array, labels: Array, covariance: Array) -> Array:
    """(w_j - w_y)^T Sigma_y (w_j - w_y) for every example's class y and all j, [B, C]."""
    own = weights.T
    # Once a class or once an example, whichever is less work.
    once_a_class = own.shape[0] <= labels.shape[0]
    if not once_a_class:
        own, covariance = own[labels], covariance[labels]
    apart = weights[None, :, :] - own[:, :, None]
    if covariance.ndim == 2:
        image = covariance[:, :, None] * apart
    else:
        image = jnp.einsum("rfg,rgc->rfc", covariance, apart)
    distances = jnp.sum(apart * image, axis=1)
    return distances[labels] if once_a_class else distances
