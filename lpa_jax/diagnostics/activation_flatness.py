"""The loss over batches as a function of the activation at an injection point."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lpa_jax import checks, metrics, tables
from lpa_jax.diagnostics import curvature
from lpa_jax.diagnostics.curvature import Estimate
from lpa_jax.diagnostics.objective import (
    Batch,
    Objective,
    ReadBatches,
    batch_losses,
    first_batch_shapes,
    objective_over,
)
from lpa_jax.injection import LOGITS, Network, Pass, Variables, as_network
from lpa_jax.losses import cross_entropy

Array = jax.Array
LEVELS = ("class", "example")


def activation_objective(
    network: Network,
    variables: Variables,
    batches: Iterable[Batch],
    layer: str,
    *,
    level: str = "class",
    loss: Callable[[Array, Array], Array] = cross_entropy,
) -> Objective:
    r"""The loss as a function of a shift of the activation h_i at an injection point.

        f_c(s) = (1/n_c) sum_{i: y_i = c} loss(decode(h_i + s), y_i)     level "class", R = C
        f_i(s) = loss(decode(h_i + s), y_i)                              level "example", R = B

    The class level is the space of LPA's perturbations, the example level that of adversarial
    feature perturbation. In evaluation mode, in which examples do not interact.

    Args:
      network: A cut network.
      variables: Its parameters and model state.
      batches: `{"image": [B, ...], "label": [B]}`, with a `"mask"` [B] if padded, preprocessed as
        for the network; any collection that can be iterated over repeatedly. At level `"example"`
        one batch (`activation_flatness` takes many).
      layer: The injection point.
      level: `"class"` or `"example"`.
      loss: (logits [B, C], targets [B, C]) -> [B].

    Returns:
      An objective of R rows, N the size of one example's activation; results are [R], nan for
      classes without examples and for padding.

    Raises:
      ValueError: Unknown layer or level, an activation that is not floating, more than one batch at
        level `"example"`, an iterator that can be used only once, no example, a label outside
        0..C-1, or a loss that is not finite.

    Example:
      >>> from lpa_jax.injection import CutFunctions
      >>> network = CutFunctions(lambda p, x: x, lambda p, h: h)
      >>> batch = {"image": jnp.zeros((3, 2)), "label": jnp.array([0, 1, 1])}
      >>> objective = activation_objective(network, {"params": ()}, [batch], "hidden")
      >>> objective.gradient(jnp.zeros((2, 2))).tolist()  # softmax - onehot
      [[-0.5, 0.5], [0.5, -0.5]]
    """
    checks.choice("level", level, LEVELS)
    network = as_network(network)
    activation, logits = first_batch_shapes(network, variables, batches, layer, LOGITS)
    if not jnp.issubdtype(activation.dtype, jnp.floating):
        raise ValueError(
            f"only a floating activation can be shifted, {layer!r} is {activation.dtype}"
        )
    rows = logits.shape[-1]
    if level == "example":
        rows = activation.shape[0]
        if len(list(itertools.islice(batches, 2))) > 1:
            raise ValueError(
                "batches must be one batch at level='example', got several; "
                "activation_flatness goes over them"
            )
    return objective_over(
        _ActivationLosses(network, loss, layer, level),
        variables,
        ReadBatches(network, batches),
        rows=rows,
        dimension=math.prod(activation.shape[1:]),
        dtype=tables.perturbation_dtype(activation),
        num_classes=logits.shape[-1],
    )


class ActivationFlatness(NamedTuple):
    """Flatness at an injection point: means over rows (classes or examples) and their errors.

    Attributes:
      rows: Number of classes or examples averaged.
      largest_eigenvalue: lambda_max of the Hessian in the activation.
      trace: Its trace.
      worst_case: Increase of the loss within the ball.
    """

    rows: int
    largest_eigenvalue: Estimate
    trace: Estimate
    worst_case: Estimate


def activation_flatness(
    network: Network,
    variables: Variables,
    batches: Iterable[Batch],
    layer: str,
    *,
    radius: float,
    rng: Array,
    level: str = "example",
    loss: Callable[[Array, Array], Array] = cross_entropy,
    lanczos_steps: int = 15,
    probes: int = 8,
    ascent_steps: int = 5,
) -> ActivationFlatness:
    r"""Largest eigenvalue, trace and worst-case loss in activation space, over any batches.

    To second order max_{||s|| <= r} f(s) = f(0) + r ||grad f|| + r^2/2 lambda_max at worst. The
    standard errors are those of the mean over examples (or classes); they include the noise of the
    trace's probes, which are drawn for every example.

    Args:
      network: A cut network.
      variables: Its parameters and model state.
      batches: As for `activation_objective`; at level `"example"` each is measured on its own.
      layer: The injection point.
      radius: r of the ball, in units of the activation, >= 0.
      rng: A key.
      level: `"example"` or `"class"`.
      loss: (logits [B, C], targets [B, C]) -> [B].
      lanczos_steps: Lanczos steps for the eigenvalue; at most N are made.
      probes: Random vectors for the trace, >= 2.
      ascent_steps: Ascent steps for the worst case.

    Raises:
      ValueError: As `activation_objective`, or a value out of range.
    """
    checks.choice("level", level, LEVELS)
    parts = [batches] if level == "class" else ([batch] for batch in batches)
    found = []
    for number, part in enumerate(parts):
        key = jax.random.fold_in(rng, number)
        objective = activation_objective(network, variables, part, layer, level=level, loss=loss)
        steps = min(lanczos_steps, objective.dimension)
        eigenvalues = curvature.top_eigenvalues(objective, 1, rng=key, steps=steps).values[:, 0]
        trace = curvature.trace(objective, rng=key, probes=probes).value
        worst = curvature.worst_case_sharpness(objective, radius, steps=ascent_steps)
        found.append(np.stack([eigenvalues, trace, worst])[:, objective.counts > 0])
    if not found:
        raise ValueError("batches must hold at least one example, got none")
    values = np.concatenate(found, axis=1)
    return ActivationFlatness(values.shape[1], *(Estimate.over(row) for row in values))


@dataclasses.dataclass(frozen=True)
class _ActivationLosses:
    """`RowLosses` with one row per class or example; equal ones are compiled once."""

    network: Network
    loss: Callable[[Array, Array], Array]
    layer: str
    level: str

    def __call__(self, variables: Variables, shift: Array, batch: Batch) -> metrics.Pair:
        inputs, labels = batch["image"], batch["label"]
        h, _ = self.network.run(Pass(variables, inputs), {}, self.layer)
        row = labels if self.level == "class" else jnp.arange(labels.shape[0])
        table = jnp.reshape(shift, (-1, *h.shape[1:]))
        # Not pgd.add_to_members, whose exact zeros have no derivative.
        pinned = {self.layer: (h.astype(shift.dtype) + table[row]).astype(h.dtype)}
        losses, counted = batch_losses(self.network, self.loss, variables, batch, pinned)
        rows = shift.shape[0]
        return tables.class_sums(losses, row, rows), tables.class_sums(counted, row, rows)
