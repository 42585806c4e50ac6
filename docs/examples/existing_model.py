"""LPA in an existing model, without editing it.

    python docs/examples/existing_model.py

`Theirs` is any network with one `__call__`, BatchNorm and Dropout. `inject` makes the output
of a named submodule an injection point. Running statistics are updated once in each step, by the
training pass, for any number of PGD steps.
"""

import functools

import digits_lt
import flax.linen as nn
import jax
import optax

import lpa_jax
from lpa_jax import data, injection


class Block(nn.Module):
    """Convolution, normalisation, relu."""

    features: int

    @nn.compact
    def __call__(self, x, train):
        """Return [B, H, W, features]."""
        x = nn.Conv(self.features, (3, 3), use_bias=False, name="conv")(x)
        return nn.relu(nn.BatchNorm(not train, momentum=0.9, name="norm")(x))


class Theirs(nn.Module):
    """A small convolutional network."""

    @nn.compact
    def __call__(self, x, train):
        """Return logits [B, 10]."""
        x = Block(8, name="block1")(x, train)
        x = Block(16, name="block2")(nn.max_pool(x, (2, 2), (2, 2)), train)
        x = nn.Dropout(0.1, deterministic=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(10, name="head")(x)


if __name__ == "__main__":
    train, test = digits_lt.load()
    batches = data.batches(train, seed=0, batch_size=64)
    print(
        "its submodules:",
        ", ".join(injection.submodule_paths(Theirs(), batches[0]["image"], train=False)),
    )

    network = lpa_jax.inject(Theirs(), "block1", "block2")
    print("injection points:", ", ".join(network.layers))
    # One value for each channel, learned from the gradient of the training pass: no extra pass.
    assignment = lpa_jax.by_frequency(train.counts)
    lpa = lpa_jax.lpa(0.1, mode="free", shape="channel", assignment=assignment)
    perturbations = {"block2": lpa}
    state = lpa_jax.TrainState.create(
        network, optax.adam(1e-2), jax.random.key(0), batches[0], perturbations
    )
    step = jax.jit(functools.partial(lpa_jax.lpa_step, perturbations=perturbations))
    for number in range(60):
        state, _ = step(state, batches[number])

    # The trained variables work with the model's own `apply`.
    digits_lt.report("LPA", Theirs().apply(state.variables, test.images, train=False), test.labels)
    delta = state.perturbation_state["block2"]["delta"]
    print(f"one perturbation per class: {delta.shape}")
