"""Draw what LPA does to two classes in a hidden layer of two units, from real training.

    python docs/figures/two_classes.py

Two digits of scikit-learn's set, 110 threes and 6 eights, train a network 64-32-2-16-2 whose layer
of two units is perturbed. ERM and LPA start from the same weights. The script prints the test
accuracies over 6 seeds, which the README gives.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from matplotlib.patches import Wedge
from sklearn.datasets import load_digits

FIGURES = pathlib.Path(__file__).parent
sys.path.insert(0, str(FIGURES.parents[1]))
import lpa_jax  # noqa: E402
from experiments.reporting import style  # noqa: E402

COUNTS, RADIUS, SEEDS, SHOWN = (110, 6), 0.25, 6, 3
STEPS = (12, 40, 120)
SIGN = np.array([-1.0, 1.0])  # contract the frequent class, expand the rare one
COLORS, NAMES = (style.BLUE, style.RED), ("frequent", "rare")
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def digits(seed: int) -> list[np.ndarray]:
    """Images [110 + 6, 64] and labels of the training set, then those of the test set."""
    found = load_digits()
    rng = np.random.default_rng(seed)
    train, test = [], []
    for digit, count in zip((3, 8), COUNTS, strict=True):
        members = rng.permutation(np.flatnonzero(found.target == digit))
        train, test = [*train, members[:count]], [*test, members[-60:]]
    parts = [np.concatenate(part) for part in (train, test)]
    images, labels = np.float32(found.data / 16), np.int32(found.target == 8)
    return [array[part] for part in parts for array in (images, labels)]


def encode(params, images):
    """Map images to the activation of two units."""
    return jnp.tanh(images @ params[0]) @ params[1] + params[2]


def decode(params, hidden):
    """Map that activation to the logits."""
    return jnp.tanh(hidden @ params[3] + params[4]) @ params[5] + params[6]


def perturbation(params, hidden, labels, radius):
    """LPA's delta of both classes, [2, 2], and its radius in units of the activation."""
    eps = radius * jnp.full(2, jnp.mean(jnp.linalg.norm(hidden, axis=1)))
    losses = lambda h: cross_entropy(decode(params, h), labels)  # noqa: E731
    return lpa_jax.class_perturbation(losses, hidden, labels, sign=SIGN, radius=eps), eps[0]


def train(key, images, labels, radius):
    """Parameters after every step, stacked; radius 0 is ERM."""
    keys, normal = jax.random.split(key, 4), jax.random.normal
    params = [
        normal(keys[0], (64, 32)) / 5, normal(keys[1], (32, 2)) / 4, jnp.zeros(2),
        normal(keys[2], (2, 16)), jnp.zeros(16), normal(keys[3], (16, 2)) / 4, jnp.zeros(2),
    ]  # fmt: skip
    optimizer = optax.adam(0.01)

    def loss(params):
        hidden = encode(params, images)
        delta, _ = perturbation(params, jax.lax.stop_gradient(hidden), labels, radius)
        return jnp.mean(cross_entropy(decode(params, hidden + delta[labels]), labels))

    def step(carried, _):
        params, state = carried
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (params, optimizer.init(params)), None, length=STEPS[-1])[1]


def accuracies(params, images, labels) -> np.ndarray:
    """Of both classes, in per cent."""
    right = np.argmax(decode(params, encode(params, images)), axis=1) == labels
    return 100 * np.array([right[labels == c].mean() for c in (0, 1)])


def panel(axis, params, sets, radius, test: bool) -> None:
    """Activations and decision boundary; with LPA, each class's delta within its half-disk.

    Args:
      axis: to draw on.
      params: of the network.
      sets: images and labels of training and test set.
      radius: of LPA, 0 for ERM.
      test: whether to show the test images of the rare class, and the accuracies.
    """
    images, labels, *held_out = sets
    hidden = np.asarray(encode(params, images))
    delta, eps = map(np.asarray, perturbation(params, hidden, labels, radius))
    before = cross_entropy(decode(params, hidden), labels)
    change = cross_entropy(decode(params, hidden + delta[labels]), labels) - before
    below, ends = ["", ""], [hidden.min(axis=0), hidden.max(axis=0), [0, 0]]
    for c in (0, 1):
        own, color = hidden[labels == c], COLORS[c]
        mean = own.mean(axis=0)
        axis.plot(*own.T, "o", color=color, markersize=3 + c, alpha=0.5 + 0.3 * c, mew=0)
        if radius:
            outward = np.degrees(np.arctan2(*(SIGN[c] * mean)[::-1]))
            axis.add_patch(Wedge(mean, eps, outward - 90, outward + 90, color=color, alpha=0.16,
                                 linewidth=0))  # fmt: skip
            arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 1.8, "shrinkA": 0,
                     "shrinkB": 0}  # fmt: skip
            axis.annotate("", mean + delta[c], mean, arrowprops=arrow)
            ratio = np.linalg.norm(mean + delta[c]) / np.linalg.norm(mean)
            below[c] = f"loss {change[labels == c].mean():+.2g}, norm x {ratio:.2f}"
            ends += [mean - eps, mean + eps]
    if test:
        below = [f"test accuracy {value:.0f} %" for value in accuracies(params, *held_out)]
        rare = np.asarray(encode(params, held_out[0][held_out[1] == 1]))
        axis.plot(*rare.T, "o", color=COLORS[1], markersize=3, markerfacecolor="none", mew=0.7)
        ends += [rare.min(axis=0), rare.max(axis=0)]
    low, high = np.min(ends, axis=0), np.max(ends, axis=0)
    middle, half = (low + high) / 2, 0.55 * (high - low).max()
    across, up = (np.linspace(m - half, m + half, 200) for m in middle)
    logits = decode(params, np.stack(np.meshgrid(across, up), -1))
    axis.contour(across, up, logits[..., 1] - logits[..., 0], [0], colors=style.INK, linewidths=1.4)
    axis.plot(0, 0, "+", color=style.INK, markersize=8)
    axis.set(xticks=[], yticks=[], aspect="equal")
    for c in (0, 1):
        line = f"{NAMES[c]}: {below[c]}".replace("-", "\N{MINUS SIGN}")
        axis.text(0, -0.03 - 0.1 * c, line, color=COLORS[c], transform=axis.transAxes, va="top",
                  fontsize=style.SMALL)  # fmt: skip


def main() -> None:
    """Train, print the test accuracies over seeds, and draw one seed."""
    sets = [np.stack(arrays) for arrays in zip(*map(digits, range(SEEDS)), strict=True)]
    keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
    run = jax.jit(jax.vmap(train, in_axes=(0, 0, 0, None)))
    found = {radius: run(keys, *sets[:2], radius) for radius in (0.0, RADIUS)}

    def at(radius, seed, step):
        return [array[seed, step - 1] for array in found[radius]]

    for radius in found:
        every = [
            accuracies(at(radius, seed, STEPS[-1]), *(array[seed] for array in sets[2:]))
            for seed in range(SEEDS)
        ]
        print(f"radius {radius}: frequent and rare, test %: {np.mean(every, axis=0).round(1)}")
    figure, axes = style.panels(2, 2, 2.5, 2.25)
    shown = [("LPA", RADIUS, step) for step in STEPS] + [("ERM", 0.0, STEPS[-1])]
    for axis, (name, radius, step) in zip(axes.flat, shown, strict=True):
        last = step == STEPS[-1]
        panel(axis, at(radius, SHOWN, step), [array[SHOWN] for array in sets], radius, last)
        axis.set_title(f"{name}, step {step}")
    with mpl.rc_context({"svg.fonttype": "path"}):
        style.save(figure, FIGURES / "two_classes.svg")


if __name__ == "__main__":
    main()
