"""Times training steps in turn with those of PyTorch, after checking that both compute the same."""

import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lpa_jax
from experiments.compiled import step_cost, timing, torch_steps
from experiments.compiled.cases import Case
from experiments.compiled.torch_steps import torch

# Largest relative distance of the first step's losses and gradients, both computed in float64: in
# float32 an activation near 0 may be on the other side of a relu.
TOLERANCE = 1e-4


class Row(NamedTuple):
    """One row of the table.

    Attributes:
      method, layer, steps: the case; `steps` is K.
      layout: memory layout of PyTorch's images, the faster one.
      ours_ms, ours_min, ours_max: milliseconds of our step, median and range over the rounds.
      torch_ms, torch_min, torch_max: those of PyTorch's in the same rounds.
      ratio: median over the rounds of our time / PyTorch's time.
    """

    method: str
    layer: str
    steps: int
    layout: str
    ours_ms: float
    ours_min: float
    ours_max: float
    torch_ms: float
    torch_min: float
    torch_max: float
    ratio: float


COLUMNS = (
    *(("method", "{method}"), ("layer", "{layer}"), ("steps", "{steps}")),
    *(("ours_ms", "{ours_ms:.2f}"), ("[min..max]", "[{ours_min:.2f}..{ours_max:.2f}]")),
    *(("torch_ms", "{torch_ms:.2f}"), ("[min..max]", "[{torch_min:.2f}..{torch_max:.2f}]")),
    *(("ratio", "{ratio:.3f}"), ("layout", "{layout}")),
)


def load() -> None:
    """Lets PyTorch use the cores that this process may use.

    Raises:
      ValueError: PyTorch is not installed.
    """
    if torch is None:
        raise ValueError("--against=torch needs PyTorch, which is not installed: pip install torch")
    torch.set_num_threads(timing.cores())


def measure(
    state: lpa_jax.TrainState,
    batch: step_cost.Batch,
    case: Case,
    rule: lpa_jax.Assignment,
    rounds: int,
    compiled: bool,
) -> Row:
    """One row: the first steps are compared, then both sides take turns.

    Args:
      state: of plain training.
      batch: of the steps.
      case: ERM, or LPA in mode cold.
      rule: the assignment rule of the case.
      rounds: number of rounds; each PyTorch layout has its own.
      compiled: whether `torch.compile` compiles PyTorch's networks.

    Raises:
      ValueError: no such step in `torch_steps`, or the first steps differ.
    """
    own_state = step_cost.with_perturbations(state, batch, case.perturbations)
    step, _ = step_cost.compile_step(own_state, batch, case.perturbations)
    _check_first_step(own_state, batch, case, rule)
    found = {}
    for layout in ("default", "channels_last"):
        theirs = _torch_step(state, batch, case, rule, layout, compiled)
        ours = timing.timed(step, own_state, batch)
        found[layout] = timing.in_turn(
            ours, timing.milliseconds(theirs), rounds, timing.WARM_UP_ROUNDS
        )
        if theirs.images.shape[1] != batch["image"].shape[-1]:
            break  # an MLP has no layouts
    layout = min(found, key=lambda name: statistics.median(found[name].second))
    return row(case.method, case.layer, case.passes, layout, found[layout])


def row(method: str, layer: str, steps: int, layout: str, times: timing.Rounds) -> Row:
    """The row of our milliseconds and PyTorch's, by round."""
    spread = [f(ms) for ms in times for f in (statistics.median, min, max)]
    ratio = timing.Rounds(times.second, times.first).ratio  # ours over PyTorch's
    return Row(method, layer, steps, layout, *spread, ratio)


def _torch_step(state, batch, case, rule, layout, compiled):
    """PyTorch's step from the weights of `state`."""
    if case.method not in ("erm", "lpa"):
        raise ValueError(
            f"--methods must be one of erm, lpa with --against=torch, got {case.method!r}"
        )
    model, images = state.network.model, torch.tensor(np.asarray(batch["image"]))
    net = torch_steps.network(model, tuple(images.shape[1:])).to(images.dtype)
    values = torch_steps.flat(state.variables["params"])
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(torch.tensor(values[name]))
    if "pool" in net:
        images = images.permute(0, 3, 1, 2).contiguous()
    if "pool" in net and layout == "channels_last":
        net, images = (x.to(memory_format=torch.channels_last) for x in (net, images))
    sign, multiplier = rule(
        jnp.zeros(model.num_classes), jnp.bincount(batch["label"], length=model.num_classes) > 0
    )
    return torch_steps.Steps(
        net=net.train(),
        images=images,
        labels=torch.tensor(np.asarray(batch["label"])).long(),
        layer=case.layer,
        steps=case.passes,
        sign=torch.tensor(np.asarray(sign)).to(images.dtype),
        radius=torch.tensor(np.asarray(step_cost.RADIUS * multiplier)).to(images.dtype),
        compiled=compiled,
    )


def _check_first_step(state, batch, case, rule) -> None:
    """Compares a step from `state` with that of PyTorch, both in float64.

    Raises:
      ValueError: the losses or gradients differ by more than the tolerance.
    """
    with jax.enable_x64(True):
        state, batch = (
            jax.tree.map(
                lambda x: x.astype("float64") if x.dtype == "float32" else jnp.copy(x), tree
            )
            for tree in (state, batch)
        )
        theirs = _torch_step(state, batch, case, rule, "default", compiled=False)
        step, _ = step_cost.compile_step(state, batch, case.perturbations)
        after, metrics = step(state, batch)
        expected = float(lpa_jax.metrics.compute(metrics)["loss"])
    loss = theirs()
    # After one step, momentum is the gradient.
    ours = torch_steps.flat(optax.tree_utils.tree_get(after.opt_state, "trace"))
    named = theirs.net.named_parameters()
    pairs = [(ours[name], parameter.grad.numpy()) for name, parameter in named]
    size = sum(np.sum(one**2) for one, _ in pairs) ** 0.5
    distance = sum(np.sum((one - other) ** 2) for one, other in pairs) ** 0.5 / size
    if not (abs(loss - expected) <= TOLERANCE * abs(expected) and distance <= TOLERANCE):
        raise ValueError(
            f"first steps must agree to {TOLERANCE}, got losses {expected} and {loss}, gradients "
            f"that differ by {distance:.1e}"
        )
