"""LPA where every pixel has a label, at the resolution of the labels and at half of it.

    python docs/examples/segmentation.py

An image shows two handwritten digits. A pixel has the class of its digit, or the label -1, which
does not count, where there is no ink. Every pixel is a member of its class: a perturbation has one
value for each channel. At half the resolution `with_labels` takes the majority of 2 x 2 pixels.
"""

import functools

import digits_lt
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lpa_jax
from lpa_jax import perturbations


class UNet(nn.Module):
    """Down to half the resolution and back up."""

    @nn.compact
    def __call__(self, x):
        """Map images [B, 8, 16, 1] to logits [B, 8, 16, 10]."""
        fine = nn.relu(nn.Conv(8, (3, 3), name="down")(x))
        coarse = nn.max_pool(fine, (2, 2), (2, 2))
        coarse = nn.relu(nn.Conv(16, (3, 3), name="middle1")(coarse))
        coarse = nn.relu(nn.Conv(32, (3, 3), name="middle2")(coarse))
        up = nn.relu(nn.ConvTranspose(16, (2, 2), (2, 2), name="up")(coarse))
        return nn.Conv(10, (3, 3), name="head")(jnp.concatenate([fine, up], axis=-1))


def strips(digits, seed, number):
    """Images [B, 8, 16, 1] of two digits each, and labels [B, 8, 16]."""
    chosen = np.random.default_rng([seed, number]).integers(0, len(digits.labels), (32, 2))
    images = np.concatenate(list(digits.images[chosen].swapaxes(0, 1)), axis=2)
    labels = np.repeat(digits.labels[chosen], 8, axis=1)[:, None, :]
    return {"image": images, "label": np.where(images[..., 0] > 0.1, labels, -1)}


if __name__ == "__main__":
    train, test = digits_lt.load(imbalance=5.0)
    example = strips(train, 0, 0)
    for path, shape in lpa_jax.injection.submodule_paths(UNet(), example["image"]).items():
        print(f"{path:8} {shape.shape}")

    rule = lpa_jax.by_frequency(train.counts)
    lpa = lpa_jax.lpa(0.02, mode="free", assignment=rule)
    placed = {"middle1": perturbations.with_labels(lpa), "up": lpa}
    network = lpa_jax.inject(UNet(), *placed)
    state = lpa_jax.TrainState.create(network, optax.adam(1e-2), jax.random.key(0), example, placed)
    step = jax.jit(functools.partial(lpa_jax.lpa_step, perturbations=placed))
    for number in range(60):
        state, _ = step(state, strips(train, 0, number))
    measured = lpa_jax.metrics.compute(jax.jit(lpa_jax.eval_step)(state, strips(test, 1, 0)))
    print(f"pixels right {measured['accuracy']:.1%}, of each digit", end=" ")
    print(", ".join(f"{share:.0%}" for share in measured["per_class_accuracy"]))
    for layer in placed:
        print(f"perturbations at {layer}:", state.perturbation_state[layer]["delta"].shape)
