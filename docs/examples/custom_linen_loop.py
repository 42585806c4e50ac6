"""LPA in your own training loop: a Linen model, an optax optimiser and one pure function.

    python docs/examples/custom_linen_loop.py

The library is used for `class_perturbation` alone. It takes the part of the network above the
perturbed activation as a function, so the model has two methods: `encode` below and `decode` above.
The printed accuracies are those of one seed, so small differences mean nothing.
"""

import digits_lt
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lpa_jax
from lpa_jax import data


class Net(nn.Module):
    """Two hidden layers; the first is perturbed."""

    def setup(self):
        """Make the layers."""
        self.first, self.second, self.head = nn.Dense(64), nn.Dense(64), nn.Dense(10)

    def encode(self, images):
        """Map images to the activation that is perturbed."""
        return nn.relu(self.first(images.reshape(images.shape[0], -1)))

    def decode(self, hidden):
        """Map that activation to the logits."""
        return self.head(nn.relu(self.second(hidden)))

    def __call__(self, images):
        """Map images to logits."""
        return self.decode(self.encode(images))


model, optimizer = Net(), optax.adam(1e-2)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
# Digits 0 to 3 are frequent: contract them a little, to lower their loss. Expand the others.
SIGN = jnp.where(jnp.arange(10) < 4, -1.0, 1.0)
REACH = jnp.where(SIGN < 0, 0.3, 1.0)


@jax.jit
def train_step(params, opt_state, batch, radius):
    """One step; `radius` is relative to the mean norm of the activations; 0 is plain training."""
    images, labels = batch["image"], batch["label"]

    def objective(params):
        hidden = model.apply(params, images, method="encode")
        frozen = jax.lax.stop_gradient(params)

        def losses(perturbed):  # [B, 64] -> [B]
            return cross_entropy(model.apply(frozen, perturbed, method="decode"), labels)

        size = radius * jnp.mean(jnp.linalg.norm(hidden, axis=-1))
        delta = lpa_jax.class_perturbation(  # [10, 64]: one perturbation per class
            losses, hidden, labels, sign=SIGN, radius=size * REACH, steps=3
        )
        logits = model.apply(params, hidden + delta[labels], method="decode")
        return jnp.mean(cross_entropy(logits, labels))

    updates, opt_state = optimizer.update(jax.grad(objective)(params), opt_state)
    return optax.apply_updates(params, updates), opt_state


if __name__ == "__main__":
    train, test = digits_lt.load()
    print(f"training images of each digit: {train.counts.tolist()}")
    batches = data.batches(train, seed=0, batch_size=64)
    for name, radius in (("ERM", 0.0), ("LPA", 0.1)):
        params = model.init(jax.random.key(0), train.images[:1])
        opt_state = optimizer.init(params)
        for step in range(150):
            params, opt_state = train_step(params, opt_state, batches[step], radius)
        digits_lt.report(name, model.apply(params, test.images), test.labels)
