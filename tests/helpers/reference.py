"""Slow references in NumPy float64: one class, one example and one step at a time.

Written from the equations of the method and sharing no code with the library, so that a mistake
would have to be made twice to go unnoticed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Network(NamedTuple):
    """The network above the injection point: logits = tanh(h w1 + b1) w2 + b2."""

    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray


def random_network(rng, feature_shape, num_classes, hidden=5, gain=1.0):
    """Weights of order one, times `gain` (0 makes the loss independent of the activation)."""
    size = int(np.prod(feature_shape))
    return Network(
        gain * rng.normal(size=(size, hidden)) / np.sqrt(size),
        rng.normal(size=hidden),
        rng.normal(size=(hidden, num_classes)),
        rng.normal(size=num_classes),
    )


def softmax(z):
    """Probabilities of one example's logits."""
    exponentials = np.exp(z - z.max())
    return exponentials / exponentials.sum()


def logits(network, h):
    """Logits [C] of one example's activation."""
    return np.tanh(np.reshape(h, -1) @ network.w1 + network.b1) @ network.w2 + network.b2


def loss(network, h, target):
    """Cross entropy of one example against a soft target [C]."""
    return -np.sum(target * np.log(softmax(logits(network, h))))


def loss_gradient(network, h, target):
    """Gradient of `loss` with respect to h, by hand."""
    activity = np.tanh(np.reshape(h, -1) @ network.w1 + network.b1)
    by_logits = np.sum(target) * softmax(activity @ network.w2 + network.b2) - target
    by_activity = (network.w2 @ by_logits) * (1.0 - activity**2)
    return np.reshape(network.w1 @ by_activity, np.shape(h))


def jax_logits(network, h):
    """Logits [B, C] of a batch, for the library, in the dtype of the activations."""
    w1, b1, w2, b2 = (jnp.asarray(w, h.dtype) for w in network)
    hidden = jnp.tanh(jnp.reshape(h, (h.shape[0], -1)) @ w1 + b1[None])
    return hidden @ w2 + b2[None]


def jax_cross_entropy(z, targets):
    """Cross entropy [B] against soft targets [B, C], for the library."""
    return -jnp.sum(targets.astype(z.dtype) * jax.nn.log_softmax(z), axis=-1)


def size(vector, norm):
    """Length of one perturbation."""
    return np.sqrt(np.sum(vector**2)) if norm == "l2" else np.max(np.abs(vector))


def project(delta, radius, toward, norm, min_cosine=0.0):
    """One perturbation into the ball and the cone cos(delta, toward) >= min_cosine, if any."""
    if norm == "linf":
        delta = np.minimum(np.maximum(delta, -radius), radius)
    if toward is not None and np.any(toward) and np.any(delta):
        axis = toward / size(toward, "l2")
        across = delta - np.sum(delta * axis) * axis
        # By angles: the row is turned towards the axis, as far as the cone reaches.
        angle = np.arctan2(size(across, "l2"), np.sum(delta * axis))
        allowed = np.arccos(min_cosine)
        if angle > allowed:
            length = size(delta, "l2") * max(np.cos(angle - allowed), 0.0)
            turned = np.sin(allowed) * across / max(size(across, "l2"), 1e-300)
            delta = length * (min_cosine * axis + turned)
    length = size(delta, norm)
    return delta * (radius / length) if length > radius else delta


def direction(gradient, positions, norm):
    """The step that a class takes for its gradient: summed over positions, of length 1."""
    ascent = np.sum(gradient, axis=positions, keepdims=True)
    if norm == "linf":
        return np.sign(ascent)
    return ascent / size(ascent, "l2") if np.any(ascent) else ascent


def class_perturbation(gradient, activations, labels, **options):
    """Perturbation of every class; gradient(i, h) is the gradient of example i's loss at h."""

    def gradients(rows):
        return np.array([gradient(i, h) for i, h in enumerate(rows)])

    members = [[label] if label >= 0 else [] for label in labels]
    return joint_perturbation(gradients, activations, members, **options)[0]


def logit_perturbation(z, labels, *, sign, radius, steps, step_size):
    """LPL in closed form: at the logits, the gradient is softmax minus one-hot."""
    num_classes = z.shape[1]
    deltas = np.zeros((num_classes, num_classes))
    for c in np.unique(labels):
        for _ in range(steps):
            moved = [softmax(z_i + deltas[c]) for z_i in z[labels == c]]
            ascent = np.mean(moved, axis=0) - np.eye(num_classes)[c]
            ascent = ascent / np.linalg.norm(ascent)
            deltas[c] += sign[c] * step_size * radius[c] / steps * ascent
            deltas[c] *= min(1.0, radius[c] / max(np.linalg.norm(deltas[c]), 1e-300))
    return deltas


def class_confidence(z, labels):
    """Mean probability of the true class over each class's members; 0 for absent classes."""
    confidence = np.zeros(z.shape[1])
    for c in np.unique(labels):
        confidence[c] = np.mean([softmax(z_i)[c] for z_i in z[labels == c]])
    return confidence


class PositionNetwork(NamedTuple):
    """Logits of every position, which sees the mean over all: tanh(h_t a + mean(h) m) b."""

    a: np.ndarray
    m: np.ndarray
    b: np.ndarray

    def logits(self, h):
        """[T, D] -> [T, C], of one example; or [B, T, D] -> [B, T, C] in JAX."""
        xp = np if isinstance(h, np.ndarray) else jnp
        mean = xp.mean(h, axis=-2, keepdims=True)
        return xp.tanh(h @ self.a + mean @ self.m) @ self.b

    def gradient(self, h, by_logits):
        """Gradient with respect to h [T, D] of a loss with that gradient at the logits, by hand."""
        activity = np.tanh(h @ self.a + h.mean(axis=0, keepdims=True) @ self.m)
        by_hidden = (by_logits @ self.b.T) * (1.0 - activity**2)
        return by_hidden @ self.a.T + (by_hidden @ self.m.T).mean(axis=0, keepdims=True)


def joint_perturbation(
    gradients,
    rows,
    members,
    *,
    sign,
    radius,
    steps=3,
    step_size=1.5,
    geometry="signed",
    norm="l2",
    shape="full",
    min_cosine=0.0,
    initial=None,
):
    """Perturbations of all classes at once, where rows interact or belong to several classes.

    Args:
      gradients: Perturbed rows [N, *S] -> gradients [N, *S] of the sum of all losses that count.
      rows: Activations, [N, *S].
      members: members[i] lists the classes of row i.
      sign, radius: As usual, [C].
      initial: Perturbations to start from, [C, *S'].

    Returns:
      The perturbations [C, *S'], and what they add to every row [N, *S].
    """
    feature_shape = rows.shape[1:]
    axes = tuple(range(len(feature_shape) - 1)) if shape == "channel" else ()
    row_shape = tuple(1 if axis in axes else n for axis, n in enumerate(feature_shape))
    deltas = np.zeros((len(sign), *row_shape)) if initial is None else np.array(initial)
    owners = [[i for i, classes in enumerate(members) if c in classes] for c in range(len(sign))]

    def into_set(c, delta):
        if not owners[c] or sign[c] == 0:
            return np.zeros(row_shape)
        mean = np.mean([rows[i] for i in owners[c]], axis=0).mean(axis=axes, keepdims=True)
        toward = {"signed": sign[c] * mean, "flipped": -sign[c] * mean, "free": None}[geometry]
        return project(delta, radius[c], toward, norm, min_cosine)

    def added(deltas):
        moved = np.zeros(rows.shape)
        for i, classes in enumerate(members):
            for c in classes:
                moved[i] = moved[i] + deltas[c] / len(classes)
        return moved

    deltas = np.array([into_set(c, delta) for c, delta in enumerate(deltas)])
    for _ in range(steps):
        by_row, new = gradients(rows + added(deltas)), deltas.copy()
        for c, own in enumerate(owners):
            ascent = np.zeros(feature_shape)
            for i in own:
                ascent = ascent + by_row[i] / (len(members[i]) * len(own))
            ascent = direction(ascent, axes, norm)
            new[c] = into_set(c, deltas[c] + sign[c] * step_size * radius[c] / steps * ascent)
        deltas = new
    return deltas, added(deltas)
