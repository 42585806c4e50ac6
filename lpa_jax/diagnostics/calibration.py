"""Whether a network's confidence matches its accuracy: reliability curve, ECE and likelihood.

Computed on the host in float64, over all examples at once: bins can be added over batches only if
their edges are fixed, and the logits of a whole test set are small.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lpa_jax import checks


class Reliability(NamedTuple):
    """Accuracy against confidence, by bins of confidence.

    Attributes:
      edges: Of the bins, [K + 1]; for adaptive bins the smallest and largest confidences in them.
      confidence: Mean confidence in each bin, [K], nan where it is empty.
      accuracy: Share of right predictions in each bin, [K], nan where it is empty.
      count: Examples in each bin, [K].
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """ECE = sum_k (n_k / n) |accuracy_k - confidence_k|, in [0, 1]."""
        filled = self.count > 0
        gaps = np.abs(self.accuracy[filled] - self.confidence[filled])
        return float(np.sum(self.count[filled] * gaps) / self.count.sum())


def reliability(
    logits: ArrayLike, labels: ArrayLike, *, bins: int = 15, adaptive: bool = False
) -> Reliability:
    r"""The reliability curve of the predicted class's probability.

        confidence_i = max_c softmax(z_i)_c,    right_i = [argmax_c z_ic = y_i].

    Equal-width bins are ((k-1)/K, k/K], as in the source; adaptive bins hold equally many examples
    (within one), sorted by confidence, ties in the order given, so that none is empty even if
    all confidences are high.

    Args:
      logits: [n, C], without padding.
      labels: [n].
      bins: K >= 1; at most n are used with `adaptive`.
      adaptive: Use bins of equal count instead of equal width.

    Raises:
      ValueError: Shapes that do not fit, no example, logits that are not finite, a label outside
        0..C-1, or `bins` out of range.

    Example:
      >>> logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
      >>> curve = reliability(logits, [0, 1, 0], bins=10)
      >>> curve.count.tolist(), round(curve.expected_calibration_error, 4)  # (2 * 0.4 + 0.4) / 3
      ([0, 0, 0, 0, 0, 1, 0, 0, 2, 0], 0.4)

    References:
      Guo et al., ICML 2017 (arXiv 1706.04599), section 2; adaptive bins as in Nixon et al.,
      2019 (arXiv 1904.01685), for the predicted class.
    """
    checks.integer("bins", bins, minimum=1)
    log_probabilities, labels = _log_probabilities(logits, labels)
    confidence = np.exp(log_probabilities.max(axis=1))
    right = log_probabilities.argmax(axis=1) == labels
    if adaptive:
        groups = np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(labels)))
        ordered = np.sort(confidence)
        starts = np.cumsum([0] + [len(group) for group in groups[:-1]])
        edges = np.append(ordered[starts], ordered[-1])
    else:
        edges = np.linspace(0, 1, bins + 1)
        # Rounding must not move a confidence on an edge, nor a certain one beyond the last bin.
        index = np.clip(np.ceil(np.round(confidence * bins, 9)).astype(int) - 1, 0, bins - 1)
        groups = [np.flatnonzero(index == k) for k in range(bins)]

    def means(values):
        return np.array([values[group].mean() if group.size else np.nan for group in groups])

    count = np.array([group.size for group in groups])
    return Reliability(edges, means(confidence), means(right), count)


def expected_calibration_error(
    logits: ArrayLike, labels: ArrayLike, *, bins: int = 15, adaptive: bool = False
) -> float:
    """ECE, the mean gap between confidence and accuracy; arguments as for `reliability`.

    Example:
      >>> round(expected_calibration_error(np.log([[0.8, 0.2]]), [0]), 4)
      0.2
    """
    return reliability(logits, labels, bins=bins, adaptive=adaptive).expected_calibration_error


def negative_log_likelihood(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean of -log softmax(z_i)[y_i], in nats: a proper score of calibration and accuracy at once.

    Args:
      logits: [n, C], without padding.
      labels: [n].

    Raises:
      ValueError: As `reliability`.

    Example:
      >>> round(negative_log_likelihood(np.log([[0.75, 0.25]]), [1]), 4)  # log 4
      1.3863
    """
    log_probabilities, labels = _log_probabilities(logits, labels)
    return float(-np.mean(log_probabilities[np.arange(len(labels)), labels]))


def _log_probabilities(logits, labels):
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not logits.size:
        raise ValueError(
            "logits and labels must have shapes [n, C] and [n] with n > 0, "
            f"got {logits.shape} and {labels.shape}"
        )
    if not np.isfinite(logits).all():
        raise ValueError("logits must be finite, got nan or infinity")
    checks.check_labels(labels, logits.shape[1])
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), labels
