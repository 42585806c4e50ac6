"""Losses on soft targets for balanced and long-tailed classification.

A loss maps logits [..., C] and targets [..., C] (class probabilities) to one value per example
[...], in nats. `cross_entropy` is one; the others are factories that check their arguments on the
host and return one. A returned loss closes over NumPy constants and can be a static argument of
`jax.jit`: build it once, since every call of a factory returns a new function, hence a new
compilation.

Every loss computes in at least float32, whatever the dtype of the logits, has finite gradients
for large finite logits and ignores a shift common to all classes, as the softmax does.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpa_jax.tracing import is_known

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy between soft targets and the softmax of the logits.

        loss(z, t) = -sum_c t_c log softmax(z)_c

    Args:
      logits: Scores [..., C] of any floating dtype.
      targets: Class probabilities [..., C].

    Returns:
      One loss per example [...], in nats, at least float32.

    Raises:
      ValueError: If the shapes of logits and targets differ.

    Example:
      >>> logits = jnp.log(jnp.array([[1.0, 3.0]]))  # softmax (1/4, 3/4)
      >>> round(float(cross_entropy(logits, jnp.array([[1.0, 0.0]]))[0]), 4)  # log 4
      1.3863
    """
    logits, targets = _prepare(logits, targets)
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def label_smoothing(smoothing: float = 0.1) -> Loss:
    """Cross entropy with targets mixed with the uniform distribution.

        t'_c = (1 - smoothing) t_c + smoothing / C,    loss(z, t) = cross_entropy(z, t')

    Args:
      smoothing: Share of the uniform distribution, in [0, 1). 0 is cross entropy.

    Returns:
      A loss.

    Raises:
      ValueError: If smoothing lies outside [0, 1).

    Example:
      >>> loss = label_smoothing(0.5)
      >>> logits = jnp.log(jnp.array([[1.0, 3.0]]))
      >>> round(float(loss(logits, jnp.array([[1.0, 0.0]]))[0]), 4)  # 3/4 log 4 + 1/4 log 4/3
      1.1116

    References:
      Szegedy et al. 2016, Rethinking the Inception Architecture for Computer Vision, section 7.
    """
    _require(not is_known(smoothing) or 0.0 <= smoothing < 1.0, "smoothing", smoothing, "in [0, 1)")

    def loss(logits, targets):
        logits, targets = _prepare(logits, targets)
        smoothed = (1.0 - smoothing) * targets + smoothing / logits.shape[-1]
        return cross_entropy(logits, smoothed)

    return loss


def logit_adjusted(counts: Sequence[float], tau: float = 1.0) -> Loss:
    """Logit-adjusted cross entropy: class priors are added to the logits while training.

        loss(z, t) = cross_entropy(z + tau log pi, t),    pi_c = N_c / sum_k N_k

    Predictions are taken from z, unadjusted.

    Args:
      counts: Training examples N_c of each class [C].
      tau: Strength, at least 0. 1 is Fisher-consistent for the balanced error, 0 is cross entropy.

    Returns:
      A loss.

    Raises:
      ValueError: If counts are not 1-D, positive and finite, or tau is negative or not finite.

    Example:
      >>> loss = logit_adjusted([3, 1])
      >>> round(float(loss(jnp.zeros((1, 2)), jnp.array([[0.0, 1.0]]))[0]), 4)  # log 4
      1.3863

    References:
      Menon et al. 2021, Long-tail learning via logit adjustment, arXiv 2007.07314, equation 10.
    """
    return _shifted_cross_entropy(_log_prior(counts, tau))


def balanced_softmax(counts: Sequence[float]) -> Loss:
    """Balanced softmax: each exponential weighted by the size of its class.

        loss(z, t) = cross_entropy(z + log N, t)

    Since the softmax ignores a common shift, this is `logit_adjusted` at tau = 1.

    Args:
      counts: Training examples N_c of each class [C].

    Returns:
      A loss.

    Raises:
      ValueError: If counts are not 1-D, positive and finite.

    Example:
      >>> loss = balanced_softmax([3, 1])
      >>> round(float(loss(jnp.zeros((1, 2)), jnp.array([[0.0, 1.0]]))[0]), 4)  # log 4
      1.3863

    References:
      Ren et al. 2020, Balanced Meta-Softmax for Long-Tailed Visual Recognition, arXiv 2007.10740.
    """
    return _shifted_cross_entropy(np.log(_check_counts(counts)))


def ldam(counts: Sequence[float], max_margin: float = 0.5, scale: float = 30.0) -> Loss:
    """Label-distribution-aware margin loss: rare classes must win by a larger margin.

        Delta_c = max_margin (min_k N_k / N_c)^(1/4)
        loss(z, t) = cross_entropy(scale (z - t * Delta), t)

    The published loss has one true class y and subtracts Delta_y from its logit. Soft targets are
    our generalisation: every class gives up its own margin in proportion to its share of the
    target, t_c Delta_c. The published scale of 30 belongs to a classifier with normalised features
    and weights, whose logits lie in [-1, 1]; for an ordinary linear output layer 1 is natural.

    Args:
      counts: Training examples N_c of each class [C].
      max_margin: Margin of the rarest class, at least 0, in units of the logits.
      scale: Inverse temperature, positive.

    Returns:
      A loss.

    Raises:
      ValueError: If counts are not 1-D, positive and finite, max_margin is negative or scale is
        not positive.

    Example:
      >>> loss = ldam([16, 1], max_margin=0.5, scale=2.0)  # margins (1/4, 1/2)
      >>> logits = jnp.array([[0.0, 0.5]])
      >>> round(float(loss(logits, jnp.array([[0.0, 1.0]]))[0]), 4)  # no lead left: log 2
      0.6931

    References:
      Cao et al. 2019, Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss,
      arXiv 1906.07413, equations 12 and 13; the scale is the released code's.
    """
    counts = _check_counts(counts)
    _require(
        not is_known(max_margin) or 0.0 <= max_margin < math.inf,
        "max_margin",
        max_margin,
        "finite and at least 0",
    )
    _require(not is_known(scale) or 0.0 < scale < math.inf, "scale", scale, "finite and positive")
    margins = max_margin * (counts.min() / counts) ** 0.25

    def loss(logits, targets):
        logits, targets = _prepare(logits, targets)
        return cross_entropy(scale * (logits - targets * _per_class(margins, logits)), targets)

    return loss


def focal(gamma: float = 2.0) -> Loss:
    """Focal loss: examples that are already classified well count less.

        loss(z, t) = -sum_c t_c (1 - p_c)^gamma log p_c,    p = softmax(z)

    This is the softmax form; with one true class it is the published (1 - p_y)^gamma (-log p_y).

    Args:
      gamma: Focusing exponent, at least 0. 0 is cross entropy.

    Returns:
      A loss.

    Raises:
      ValueError: If gamma is negative or not finite.

    Example:
      >>> logits = jnp.log(jnp.array([[1.0, 3.0]]))  # softmax (1/4, 3/4)
      >>> round(float(focal(2.0)(logits, jnp.array([[0.0, 1.0]]))[0]), 4)  # log(4/3) / 16
      0.018

    References:
      Lin et al. 2017, Focal Loss for Dense Object Detection, arXiv 1708.02002, equation 4.
    """
    _require(
        not is_known(gamma) or 0.0 <= gamma < math.inf, "gamma", gamma, "finite and at least 0"
    )

    def loss(logits, targets):
        logits, targets = _prepare(logits, targets)
        surprise = -jax.nn.log_softmax(logits)
        # Where p_c rounds to 1 the slope is 0, but for gamma < 1 the chain rule multiplies 0 by
        # infinity: the inner `where` keeps that out of the backward pass.
        uncertain = surprise > 0.0
        safe = jnp.where(uncertain, surprise, 1.0)
        focused = jnp.where(uncertain, safe * (-jnp.expm1(-safe)) ** gamma, 0.0)
        return jnp.sum(targets * focused, axis=-1)

    return loss


def effective_number_weights(counts: Sequence[float], beta: float = 0.9999) -> np.ndarray:
    """Class weights inversely proportional to the effective number of examples.

        E_c = (1 - beta^N_c) / (1 - beta),    w_c = C (1 / E_c) / sum_k (1 / E_k)

    Args:
      counts: Training examples N_c of each class [C].
      beta: In [0, 1). 0 weights all classes equally, towards 1 by inverse frequency.

    Returns:
      Weights [C], float64, that sum to C.

    Raises:
      ValueError: If counts are not 1-D, positive and finite, or beta lies outside [0, 1).

    Example:
      >>> effective_number_weights([1, 2], beta=0.5)  # E = (1, 1.5)
      array([1.2, 0.8])

    References:
      Cui et al. 2019, Class-Balanced Loss Based on Effective Number of Samples, arXiv 1901.05555,
      proposition 1 and the normalisation of section 4.
    """
    counts = _check_counts(counts)
    _require(0.0 <= beta < 1.0, "beta", beta, "in [0, 1)")
    # expm1 keeps the digits that 1 - beta**N loses for beta near 1.
    inverse = 1.0 / -np.expm1(counts * (math.log(beta) if beta > 0.0 else -math.inf))
    return inverse * (counts.size / inverse.sum())


def class_balanced(
    counts: Sequence[float], beta: float = 0.9999, base: Loss = cross_entropy
) -> Loss:
    """Any loss, weighted by the effective number of examples of the target's class.

        loss(z, t) = (sum_c t_c w_c) base(z, t),    w = effective_number_weights(counts, beta)

    A soft target takes its expected weight. The mean over a batch is left unnormalised: it divides
    by the number of examples, not by the sum of their weights as PyTorch's weighted loss does.

    Args:
      counts: Training examples N_c of each class [C].
      beta: In [0, 1), see `effective_number_weights`.
      base: The loss to weight, for example ``focal(2.0)`` or ``ldam(counts)``.

    Returns:
      A loss.

    Raises:
      ValueError: If counts are not 1-D, positive and finite, beta lies outside [0, 1) or base is
        not a function.

    Example:
      >>> loss = class_balanced([1, 2], beta=0.5, base=focal(0.0))  # weights (1.2, 0.8)
      >>> round(float(loss(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]))[0]), 4)  # 1.2 log 2
      0.8318

    References:
      Cui et al. 2019, arXiv 1901.05555, section 4.
    """
    weights = effective_number_weights(counts, beta)
    _require(callable(base), "base", base, "a loss(logits, targets)")

    def loss(logits, targets):
        logits, targets = _prepare(logits, targets)
        return jnp.sum(targets * _per_class(weights, logits), axis=-1) * base(logits, targets)

    return loss


def drw_stages(
    counts: Sequence[float],
    switch_epoch: int,
    *,
    max_margin: float = 0.5,
    scale: float = 30.0,
    beta: float = 0.9999,
) -> tuple[tuple[int, Loss], tuple[int, Loss]]:
    """Deferred re-weighting (DRW): LDAM first, class-balanced LDAM from `switch_epoch` on.

    Args:
      counts: Training examples N_c of each class [C].
      switch_epoch: First epoch (from 0) with weights, at least 1. The paper takes 160 of 200.
      max_margin: See `ldam`.
      scale: See `ldam`.
      beta: See `effective_number_weights`.

    Returns:
      Pairs (first epoch, loss), in order: the last pair whose epoch has come is in force.

    Raises:
      ValueError: If switch_epoch is not an integer of at least 1, or where `ldam` or
        `class_balanced` raises.

    Example:
      >>> (start, plain), (switch, weighted) = drw_stages([16, 1], switch_epoch=160)
      >>> start, switch
      (0, 160)

    References:
      Cao et al. 2019, arXiv 1906.07413, algorithm 1, with the released code's weights.
    """
    whole = isinstance(switch_epoch, int) and not isinstance(switch_epoch, bool)
    _require(whole and switch_epoch >= 1, "switch_epoch", switch_epoch, "an integer of at least 1")
    margin_loss = ldam(counts, max_margin, scale)
    return (0, margin_loss), (switch_epoch, class_balanced(counts, beta, margin_loss))


def adjust_logits(logits: jax.Array, counts: Sequence[float], tau: float = 1.0) -> jax.Array:
    """Post-hoc logit adjustment of a network that was trained with plain cross entropy.

        z' = z - tau log pi,    pi_c = N_c / sum_k N_k

    The sign is opposite to `logit_adjusted`, which adds the prior in training: use one only.

    Args:
      logits: Scores [..., C].
      counts: Training examples N_c of each class [C].
      tau: Strength, at least 0.

    Returns:
      Adjusted logits [..., C], at least float32.

    Raises:
      ValueError: If counts are not [C], positive and finite, or tau is negative or not finite.

    Example:
      >>> int(adjust_logits(jnp.array([0.5, 0.0]), [3, 1]).argmax())
      1

    References:
      Menon et al. 2021, arXiv 2007.07314, equation 9.
    """
    logits = _at_least_float32(jnp.asarray(logits))
    return logits - _per_class(_log_prior(counts, tau), logits)


_FACTORIES: dict[str, Callable[..., Loss]] = {
    "cross_entropy": lambda: cross_entropy,
    "label_smoothing": label_smoothing,
    "logit_adjusted": logit_adjusted,
    "balanced_softmax": balanced_softmax,
    "ldam": ldam,
    "focal": focal,
    "class_balanced": class_balanced,
}


def names() -> tuple[str, ...]:
    """Names that `create` knows.

    Example:
      >>> "ldam" in names()
      True
    """
    return tuple(_FACTORIES)


def options(name: str) -> tuple[str, ...]:
    """Names of the options of a loss, the class counts left out.

    Raises:
      ValueError: unknown name.

    Example:
      >>> options("focal")
      ('gamma',)
    """
    if name not in _FACTORIES:
        raise ValueError(f"name must be one of {', '.join(names())}; got {name!r}")
    return tuple(key for key in inspect.signature(_FACTORIES[name]).parameters if key != "counts")


def create(name: str, counts: Sequence[float] | None = None, **arguments: Any) -> Loss:
    """The loss of that name.

    Args:
      name: One of `names`.
      counts: Training examples of each class [C]; left unused by the losses that need none.
      **arguments: Keyword arguments of the factory, such as ``gamma`` for ``focal``.

    Returns:
      A loss.

    Raises:
      ValueError: If name or an option is unknown, counts are needed and missing, or the factory
        refuses an argument.

    Example:
      >>> create("cross_entropy") is cross_entropy
      True
      >>> create("ldam")
      Traceback (most recent call last):
        ...
      ValueError: counts must be given for the loss 'ldam'; got None
    """
    allowed = options(name)
    for key, value in arguments.items():
        if key not in allowed:
            raise ValueError(
                f"options of the loss {name!r} must be among {list(allowed)}; got {key}={value!r}"
            )
    factory = _FACTORIES[name]
    if "counts" not in inspect.signature(factory).parameters:
        return factory(**arguments)
    if counts is None:
        raise ValueError(f"counts must be given for the loss {name!r}; got None")
    return factory(counts, **arguments)


def _require(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}; got {value!r}")


def _check_counts(counts: Sequence[float]) -> np.ndarray:
    try:
        array = np.asarray(counts, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            "counts must be a 1-D sequence of numbers known on the host; "
            f"got {type(counts).__name__}"
        ) from None
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"counts must be 1-D with one entry for each class; got shape {array.shape}"
        )
    bad = np.flatnonzero(~(np.isfinite(array) & (array > 0.0)))
    if bad.size:
        raise ValueError(
            f"counts must be positive and finite; got {array[bad[0]]:g} for class {bad[0]}"
        )
    return array


def _log_prior(counts: Sequence[float], tau: float) -> np.ndarray:
    counts = _check_counts(counts)
    _require(not is_known(tau) or 0.0 <= tau < math.inf, "tau", tau, "finite and at least 0")
    return tau * np.log(counts / counts.sum())


def _shifted_cross_entropy(shift: np.ndarray) -> Loss:
    def loss(logits, targets):
        logits, targets = _prepare(logits, targets)
        return cross_entropy(logits + _per_class(shift, logits), targets)

    return loss


def _at_least_float32(array: jax.Array) -> jax.Array:
    return array if array.dtype == jnp.float64 else array.astype(jnp.float32)


def _prepare(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both in one dtype of at least float32; integer labels for targets fail by their shape."""
    logits, targets = jnp.asarray(logits), jnp.asarray(targets)
    if logits.shape != targets.shape or logits.ndim == 0:
        raise ValueError(
            f"targets must be class probabilities with the shape of logits, {logits.shape}; "
            f"got shape {targets.shape}"
        )
    logits = _at_least_float32(logits)
    return logits, targets.astype(logits.dtype)


def _per_class(vector: np.ndarray, logits: jax.Array) -> jax.Array:
    """A class constant [C] in the dtype and rank of the logits [..., C]."""
    if vector.size != logits.shape[-1]:
        raise ValueError(
            f"counts must have one entry for each of the {logits.shape[-1]} classes of logits; "
            f"got {vector.size}"
        )
    return jnp.asarray(vector.reshape((1,) * (logits.ndim - 1) + (-1,)), dtype=logits.dtype)
