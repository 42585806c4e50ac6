"""The perturbations that `benchmark` measures: methods x layers x PGD steps."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lpa_jax
from experiments.compiled import step_cost
from experiments.methods.names import ERM
from lpa_jax import checks, perturbations
from lpa_jax.perturbations import Perturbation
from lpa_jax.perturbations.lpa import MODES


class Case(NamedTuple):
    """One row to measure.

    Attributes:
      method: as on the command line.
      layer: injection point, "-" for ERM.
      passes: K, gradient passes above the layer before the training pass.
      perturbations: by layer, as `lpa_step` takes them.
      examples: share of the batch on which these passes run.
    """

    method: str
    layer: str
    passes: int
    perturbations: Mapping[str, Perturbation]
    examples: float = 1.0


def make_cases(
    methods: Sequence[str],
    layers: Sequence[str],
    steps: Sequence[int],
    assignment: lpa_jax.Assignment,
    examples: float = 1.0,
) -> list[Case]:
    """Every method at every layer, with every number of PGD steps if it takes one.

    PGD of a cold `lpa` runs on the share `examples` of the batch.

    Raises:
      ValueError: unknown method or mode.
    """
    return [
        Case(method, layer, passes, {} if perturbation is None else {layer: perturbation}, share)
        for method in methods
        for layer in (["-"] if method == ERM else layers)
        for share in [examples if method in ("lpa", "lpa:cold") else 1.0]
        for passes, perturbation in _variants(method, steps, assignment, share)
    ]


def _variants(
    method: str, steps: Sequence[int], assignment: lpa_jax.Assignment, examples: float
) -> list[tuple[int, Perturbation | None]]:
    """(K, perturbation) for every number of steps to measure `method` with."""
    if method == ERM:
        return [(0, None)]
    name, _, mode = method.partition(":")
    if name not in perturbations.names():
        checks.choice("--methods", method, (ERM, *perturbations.names(), "lpa:MODE"))
    takes = perturbations.options(name)
    if ":" in method and ("mode" not in takes or mode not in MODES):
        raise ValueError(
            f"--methods: MODE in lpa:MODE must be one of {', '.join(MODES)}, got {method!r}"
        )
    fixed: dict[str, Any] = {"mode": mode} if mode else {}
    fixed |= {"radius": step_cost.RADIUS} if "radius" in takes else {}
    fixed |= {"assignment": assignment} if "assignment" in takes else {}
    fixed |= {"examples": examples} if examples != 1 else {}
    create = functools.partial(perturbations.create, name, **fixed)
    if "steps" not in takes:
        return [(0, create())]
    if mode in ("carry", "free"):
        return [(1 if mode == "carry" else 0, create(steps=1))]
    return [(count, create(steps=count)) for count in steps]
