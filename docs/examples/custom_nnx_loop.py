"""LPA in a loop with `nnx.Optimizer`: the perturbations of the library, a step of one's own.

    python docs/examples/custom_nnx_loop.py

`perturbed_forward` runs the network under perturbations and returns logits and targets. Which loss,
which optimiser and what else happens in a step is up to the loop. The states of the perturbations
go through it, as those of an optimiser do: here each class's perturbation is carried from step to
step, so that one ascent step is enough.
"""

import digits_lt
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lpa_jax
from lpa_jax import data


class Net(nnx.Module):
    """Two hidden layers; the first is perturbed."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.second = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        """Map images to logits."""
        hidden = nnx.relu(self.first(images.reshape(images.shape[0], -1)))
        return self.head(nnx.relu(self.second(hidden)))


def make_step(network, perturbations):
    """Make the compiled step."""

    @nnx.jit
    def train_step(model, optimizer, states, batch, rng):
        """Update model and optimiser in place; return the states of the perturbations."""
        _, params, rest = nnx.split(model, nnx.Param, ...)

        def objective(params):
            variables = {"params": params, "nnx": rest}
            out = lpa_jax.perturbed_forward(
                perturbations, states, network, variables, batch, rng=rng
            )
            return out.mean(lpa_jax.cross_entropy(out.logits, out.targets)), out.states

        gradient, states = jax.grad(objective, has_aux=True)(params)
        optimizer.update(model, gradient)
        return states

    return train_step


if __name__ == "__main__":
    train, test = digits_lt.load()
    batches = data.batches(train, seed=0, batch_size=64)
    rule = lpa_jax.by_frequency(train.counts)
    lpa = lpa_jax.lpa(0.1, mode="carry", assignment=rule, negative_scale=0.3)
    for name, perturbations in (("ERM", {}), ("LPA", {"first": lpa})):
        model = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        network = lpa_jax.inject(model, "first")
        variables = network.init(jax.random.key(0), batches[0]["image"])
        states = lpa_jax.initial_states(perturbations, network, variables, batches[0])
        train_step = make_step(network, perturbations)
        for step in range(150):
            rng = jax.random.fold_in(jax.random.key(1), step)
            states = train_step(model, optimizer, states, batches[step], rng)
        digits_lt.report(name, model(test.images), test.labels)
    norms = jnp.linalg.norm(states["first"]["delta"], axis=-1)
    print("length of each digit's perturbation:", " ".join(f"{norm:.2f}" for norm in norms))
