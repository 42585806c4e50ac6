"""Gradient accumulation: a large batch in the memory of a small one, with exact class statistics.

`accumulate` makes a network that runs its training passes micro-batch by micro-batch. The step
around it does not change and sees the whole batch at every injection point: class means, class
gradients, radii, confidences, the pairs of Manifold Mixup and the penalties are those of the whole
batch. Only batch normalisation and dropout inside the network work per micro-batch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lpa_jax import checks
from lpa_jax.injection.api import as_network
from lpa_jax.injection.base import Array, Network, Pass, Variables, model_state, run_by_segments


@dataclasses.dataclass(frozen=True)
class Accumulated:
    """A network whose training passes run micro-batch by micro-batch; made by `accumulate`.

    Attributes:
      network: The network that runs.
      micro_batches: k, the number of parts of a device's share of the batch.
    """

    network: Network
    micro_batches: int

    @property
    def layers(self) -> tuple[str, ...]:
        """Injection points of the network."""
        return self.network.layers

    def init(self, rng: Array, inputs: Array) -> Variables:
        """Initial variables; see `Network.init`."""
        return self.network.init(rng, inputs)

    def run(self, given: Pass, pinned: Mapping[str, Array], stop: str) -> tuple[Array, Variables]:
        """Runs the network part by part in training, all at once in evaluation.

        See `Network.run`. The key of part j is `fold_in(rng, j)`, as that of device j is.

        Raises:
          ValueError: The batch does not divide into `micro_batches` equal parts.
        """
        if not given.train or stop in pinned:
            return self.network.run(given, pinned, stop)
        if given.sown:
            raise ValueError(
                f"micro_batches must be 1 where sown values are read, got {self.micro_batches}"
            )

        def run_part(_, part):
            number, inputs, pinned = part
            rng = None if given.rng is None else jax.random.fold_in(given.rng, number)
            return None, self.network.run(given._replace(inputs=inputs, rng=rng), pinned, stop)

        # Only the result of a part is kept: its gradient runs the part again.
        _, (activations, states) = jax.lax.scan(
            jax.checkpoint(run_part, prevent_cse=False),
            None,
            (jnp.arange(self.micro_batches), self._cut(given.inputs), self._cut(dict(pinned))),
        )
        whole = jnp.reshape(activations, (-1, *activations.shape[2:]))
        return whole, jax.tree.map(_mean_update, model_state(given.variables), states)

    run_with_taps = run_by_segments

    def _cut(self, batch: Any) -> Any:
        def cut(values):
            size, parts = values.shape[0], self.micro_batches
            if size % parts:
                raise ValueError(
                    f"micro_batches={parts} must divide the {size} examples of a device's batch"
                )
            return jnp.reshape(values, (parts, size // parts, *values.shape[1:]))

        return jax.tree.map(cut, batch)


def accumulate(model: Any, micro_batches: int) -> Network:
    r"""The same network, with the activations of one micro-batch in memory at a time.

    The batch is cut into k = `micro_batches` equal parts. Between two perturbed layers (and the
    ends of the network) the parts run one after the other, and their activations are not kept; the
    backward pass computes them again, part by part, and sums the gradients of the parameters.

    Formal guarantees, for a network without batch normalisation and dropout: `lpa_step` gives the
    result of the whole batch at once, up to the order of summation, for every perturbation and
    penalty: the statistics of a class are those of all its examples in the global batch. Otherwise
    k parts on one device give what k devices with local statistics give: batch normalisation
    normalises within a part; every part updates the same old running statistics, and the mean of
    the updates is kept, once per step; dropout draws one mask per part.

    Cost: one more forward pass for every backward pass, so about 4/3 of an ERM step's arithmetic.
    Memory: the activations of one part, and of the whole batch those at the input, at the perturbed
    layers and at the logits.

    Args:
      model: A staged model or a cut network, as for `TrainState.create`, which takes the result.
      micro_batches: k >= 1; 1 changes nothing.

    Raises:
      ValueError: `micro_batches` is not a whole number >= 1; when traced, the share of a device
        is not a multiple of it.

    Example:
      >>> from lpa_jax.models import MLP
      >>> accumulate(MLP(num_classes=3), 4).layers
      ('input', 'hidden1', 'hidden2', 'hidden3', 'logits')
    """
    micro_batches = checks.integer("micro_batches", micro_batches, 1)
    network = as_network(model)
    return network if micro_batches == 1 else Accumulated(network, micro_batches)


def _mean_update(old: Array, new: Array) -> Array:
    """Mean over the parts' updates [k, ...] of `old`; counters are equal in all parts."""
    if not jnp.issubdtype(new.dtype, jnp.floating):
        return new[0]
    return old + jnp.mean(new - old[None], axis=0)
