"""How similar two networks are in their representations and predictions on the same data."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

_EXACT = jax.lax.Precision.HIGHEST


def linear_cka(x: ArrayLike, y: ArrayLike, *, debiased: bool = False) -> float:
    r"""Linear centred kernel alignment of two representations of the same examples.

        CKA = <K, L> / sqrt(<K, K> <L, L>),    K = X X^T, L = Y Y^T, columns of X and Y centred.

    1 for representations that are equal up to rotation, shift and scale. With few examples in many
    dimensions the plain estimate is far above 0 even for independent representations; `debiased`
    takes the unbiased estimate of <., .> (diagonals left out), which then is near 0, and may be
    negative.

    Args:
      x: Activations [n, ...], flattened to [n, p].
      y: Activations [n, ...] of the same examples in the same order.
      debiased: Use the unbiased estimator; needs n >= 4.

    Raises:
      ValueError: Numbers of examples that differ or are too small, values that are not finite, or
        a representation in which all examples are the same.

    Example:
      >>> x = np.array([[1.0, 2.0], [3.0, 5.0], [4.0, 1.0]])
      >>> round(linear_cka(x, 7 - 2 * x[:, ::-1]), 4)
      1.0

    References:
      Kornblith et al., ICML 2019 (arXiv 1905.00414), section 3; unbiased HSIC of Song et al.,
      JMLR 13 (2012), as used for CKA by Nguyen et al., ICLR 2021 (arXiv 2010.15327).
    """
    x, y = _features("x", x), _features("y", y)
    least = 4 if debiased else 2
    if len(x) != len(y) or len(x) < least:
        raise ValueError(
            f"x and y must hold the same examples, at least {least}, got {len(x)} and {len(y)}"
        )
    alignment = _unbiased_alignment if debiased else _alignment
    with_self = float(alignment(x, x)), float(alignment(y, y))
    for name, features, value in zip("xy", (x, y), with_self, strict=True):
        if not value > 0 or not bool(jnp.any(features)):
            raise ValueError(f"{name} must differ between examples, got one value for all")
    return float(alignment(x, y)) / float(np.sqrt(with_self[0] * with_self[1]))


def prediction_agreement(a: ArrayLike, b: ArrayLike) -> float:
    """Share of examples for which two networks predict the same class.

    Two accurate networks agree because they rarely err; `error_consistency` corrects for that.

    Args:
      a: Logits [n, C] of one network.
      b: Logits [n, C] of the other on the same examples.

    Raises:
      ValueError: Shapes that differ, no example, or logits that are not finite.

    Example:
      >>> prediction_agreement([[2.0, 1.0], [0.0, 1.0]], [[5.0, 1.0], [1.0, 0.0]])
      0.5
    """
    return float(np.mean(_predictions("a", a, b) == _predictions("b", b, a)))


def error_consistency(a: ArrayLike, b: ArrayLike, labels: ArrayLike) -> float:
    r"""Cohen's kappa of being right: whether two networks err on the same examples beyond chance.

        kappa = (o - e) / (1 - e),    e = p_a p_b + (1 - p_a)(1 - p_b),

    with o the share of examples on which both are right or both wrong and p the accuracies. 1 is
    equal errors, 0 independent ones.

    Args:
      a: Logits [n, C] of one network.
      b: Logits [n, C] of the other on the same examples.
      labels: Classes [n].

    Returns:
      kappa; nan if both networks are always right or always wrong.

    Raises:
      ValueError: Shapes that do not fit, no example, or logits that are not finite.

    Example:
      >>> right, wrong = [1.0, 0.0], [0.0, 1.0]
      >>> error_consistency([right, wrong], [right, wrong], [0, 0])
      1.0

    References:
      Geirhos et al., NeurIPS 2020 (arXiv 2006.16736).
    """
    labels = np.asarray(labels)
    right_a, right_b = _predictions("a", a, b) == labels, _predictions("b", b, a) == labels
    if labels.shape != np.shape(a)[:1]:
        raise ValueError(
            f"labels must have one entry for each of {len(right_a)} rows, got shape {labels.shape}"
        )
    observed, p, q = np.mean(right_a == right_b), right_a.mean(), right_b.mean()
    expected = p * q + (1 - p) * (1 - q)
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


@jax.jit
def _alignment(x, y):
    """||X^T Y||_F^2, through the smaller of the two sides."""
    if x.shape[0] < min(x.shape[1], y.shape[1]):
        return jnp.sum(_gram(x) * _gram(y))
    return jnp.sum(jnp.square(jnp.matmul(x.T, y, precision=_EXACT)))


@jax.jit
def _unbiased_alignment(x, y):
    """N (n - 3) times the unbiased estimate of HSIC."""
    n = x.shape[0]
    k, m = (gram * (1 - jnp.eye(n, dtype=gram.dtype)) for gram in (_gram(x), _gram(y)))
    whole = jnp.sum(k) * jnp.sum(m) / ((n - 1) * (n - 2))
    rows = jnp.sum(jnp.sum(k, axis=0) * jnp.sum(m, axis=0))
    return jnp.sum(k * m) + whole - 2 / (n - 2) * rows


def _gram(x):
    return jnp.matmul(x, x.T, precision=_EXACT)


def _features(name, values):
    values = jnp.asarray(values)
    if values.ndim < 2 or not values.size:
        raise ValueError(f"{name} must be activations [n, ...], got shape {values.shape}")
    values = jnp.reshape(values, (values.shape[0], -1))
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if not bool(jnp.all(jnp.isfinite(values))):
        raise ValueError(f"{name} must be finite, got nan or infinity")
    values = values - jnp.mean(values, axis=0, keepdims=True)
    largest = jnp.max(jnp.abs(values))
    return values / jnp.where(largest > 0, largest, 1.0)


def _predictions(name, logits, other):
    logits = np.asarray(logits)
    if logits.ndim != 2 or not logits.size or logits.shape != np.shape(other):
        raise ValueError(
            f"a and b must be logits of one shape [n, C], got {name} {logits.shape} "
            f"beside {np.shape(other)}"
        )
    if not np.isfinite(logits).all():
        raise ValueError(f"{name} must be finite, got nan or infinity")
    return logits.argmax(axis=1)
