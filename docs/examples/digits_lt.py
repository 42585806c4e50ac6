"""Data of the examples: the handwritten digits that ship with scikit-learn, made long-tailed."""

import jax
import numpy as np
from sklearn.datasets import load_digits

from lpa_jax import data


def load(imbalance: float = 30.0) -> tuple[data.Dataset, data.Dataset]:
    """A long-tailed training set (digit 0 most frequent, digit 9 rarest) and a balanced test set.

    Images are [8, 8, 1] with intensities in 0..1.
    """
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    whole = data.Dataset("digits", images, digits.target, num_classes=10)
    pool, test = data.validation_split(whole.labels, per_class=50)
    kept = data.long_tail_indices(whole.labels[pool], num_classes=10, imbalance=imbalance)
    return whole.subset(pool[kept]), whole.subset(test)


def report(name: str, logits: jax.Array, labels: np.ndarray) -> None:
    """Print the accuracy over all classes and over the three rarest."""
    right = np.argmax(logits, axis=-1) == labels
    print(f"{name:8} all {right.mean():6.1%}   rare {right[labels >= 7].mean():6.1%}")
