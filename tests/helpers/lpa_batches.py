"""Batches at an injection point for the tests of LPA and LPL, with what NumPy expects of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lpa_jax import assignment
from lpa_jax.perturbations import Site
from tests.helpers import reference

CLASSES, FEATURES = 4, (2, 3)
LABELS = np.array([0, 1, 1, 3, 0, 3], np.int32)  # class 2 is absent
SIGN = np.array([1.0, -1.0, 1.0, -1.0])
MULTIPLIER = np.array([1.0, 0.5, 2.0, 1.5])
CUSTOM = assignment.custom(SIGN, MULTIPLIER)
MODES = ("cold", "carry", "free")


class Batch:
    """One batch at the injection point, with a random network above it."""

    def __init__(self, seed=0, labels=LABELS, num_classes=CLASSES, feature_shape=FEATURES):
        self.network = reference.random_network(
            np.random.default_rng(9), feature_shape, num_classes
        )
        rng = np.random.default_rng(seed)
        self.labels, self.num_classes = np.asarray(labels), num_classes
        self.activations = rng.normal(size=(len(labels), *feature_shape))
        self.targets = 0.9 * np.eye(num_classes)[self.labels] + 0.1 / num_classes

    @property
    def logits(self):
        return np.array([reference.logits(self.network, h) for h in self.activations])

    def numpy_gradient(self, i, h):
        return reference.loss_gradient(self.network, h, self.targets[i])

    def site(self, dtype=jnp.float64, network=None):
        network = network or self.network
        return Site(
            activation=jnp.asarray(self.activations, dtype),
            targets=jnp.asarray(self.targets, dtype),
            labels=jnp.asarray(self.labels),
            decode=lambda h: reference.jax_logits(network, h),
            loss=reference.jax_cross_entropy,
            rng=jax.random.key(0),
        )

    def init(self, perturbation, dtype=jnp.float64):
        h = jax.ShapeDtypeStruct(self.activations.shape, dtype)
        return perturbation.init(h, self.num_classes)

    def present(self):
        return np.isin(np.arange(self.num_classes), self.labels)

    def class_mean(self, c, shape="full"):
        mean = self.activations[self.labels == c].mean(axis=0)
        return mean if shape == "full" else mean.mean(axis=0, keepdims=True)

    def seen(self, applied):
        """What the perturbation added to every example."""
        return np.asarray(applied.activation, np.float64) - self.activations


class LogitBatch(Batch):
    """One batch at the injection point `logits`, with hard targets."""

    def __init__(self, seed=0, labels=LABELS):
        super().__init__(seed, labels, feature_shape=(CLASSES,))
        self.targets = np.eye(CLASSES)[self.labels]
        # Where the true class leads, a half-space would cut what LPL does.
        self.activations += 2.0 * self.targets

    @property
    def logits(self):
        return self.activations

    def site(self, dtype=jnp.float64):
        return dataclasses.replace(super().site(dtype), decode=lambda h: h)


def confidence_signs(confidence, present):
    return np.where(present, np.sign(confidence[present].mean() - confidence), 0)


def expected_scale(batch, scale, norm, shape):
    if scale == "absolute":
        return 1.0
    sizes = []
    for h in batch.activations:
        h = h if shape == "full" else h.mean(axis=0)
        sizes.append(reference.size(h, norm))
    return np.mean(sizes)
