"""The same with an NNX module, and the perturbations carried from step to step.

    python docs/examples/custom_nnx_loop.py

A perturbation belongs to a class, not to an example, so the next batch can start from the last
perturbation (`initial=`), and one ascent step is enough. `class_perturbation` returns zero for a
class that is absent from a batch, so the loop keeps its old perturbation.
"""

import digits_lt
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lpa_jax
from lpa_jax import data

SIGN = jnp.where(jnp.arange(10) < 4, -1.0, 1.0)  # contract frequent digits, expand rare ones
REACH = jnp.where(SIGN < 0, 0.3, 1.0)  # contract less than expand
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Net(nnx.Module):
    """Two hidden layers; the first is perturbed."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.second = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def encode(self, images):
        """Map images to the activation that is perturbed."""
        return nnx.relu(self.first(images.reshape(images.shape[0], -1)))

    def decode(self, hidden):
        """Map that activation to the logits."""
        return self.head(nnx.relu(self.second(hidden)))


@nnx.jit
def train_step(model, optimizer, carried, batch, radius):
    """Update model and optimiser in place; return the perturbations for the next step."""
    images, labels = batch["image"], batch["label"]

    def objective(model):
        hidden = model.encode(images)
        graph, variables = nnx.split(model)
        frozen = nnx.merge(graph, jax.lax.stop_gradient(variables))
        size = radius * jnp.mean(jnp.linalg.norm(hidden, axis=-1))
        delta = lpa_jax.class_perturbation(
            lambda perturbed: cross_entropy(frozen.decode(perturbed), labels),
            hidden,
            labels,
            sign=SIGN,
            radius=size * REACH,
            steps=1,
            initial=carried,
        )
        logits = model.decode(hidden + delta[labels])
        return jnp.mean(cross_entropy(logits, labels)), delta

    gradient, delta = nnx.grad(objective, has_aux=True)(model)
    optimizer.update(model, gradient)
    present = jnp.bincount(labels, length=10) > 0
    return jnp.where(present[:, None], delta, carried)


if __name__ == "__main__":
    train, test = digits_lt.load()
    batches = data.batches(train, seed=0, batch_size=64)
    for name, radius in (("ERM", 0.0), ("LPA", 0.1)):
        model = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        carried = jnp.zeros((10, 64))
        for step in range(150):
            carried = train_step(model, optimizer, carried, batches[step], radius)
        digits_lt.report(name, model.decode(model.encode(test.images)), test.labels)
    norms = jnp.linalg.norm(carried, axis=-1)
    print("length of each digit's perturbation:", " ".join(f"{norm:.2f}" for norm in norms))
