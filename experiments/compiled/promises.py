"""Checks promises about the compiled step of LPA against the compiled text.

A check compares multisets: convolutions and matrix products by layer, part in backpropagation and
result, or exchanged arrays by type and number of elements.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import lpa_jax
from experiments.compiled import hlo, step_cost, tpu
from experiments.methods import build
from lpa_jax.perturbations import Perturbation


@dataclasses.dataclass(frozen=True)
class Method:
    """LPA at one injection point; the fields are options of `lpa_jax.lpa`."""

    layer: str
    mode: str
    steps: int
    shape: str
    geometry: str
    assignment: str

    @property
    def passes(self) -> int:
        """K, gradient passes above the layer before the training pass."""
        return 0 if self.mode == "free" else self.steps

    @property
    def forward_passes(self) -> int:
        """Extra forward passes: mode carry needs one for the clean confidence."""
        return int(self.mode == "carry" and self.assignment == "confidence")

    def perturbations(self, setting: tpu.Setting) -> dict[str, Perturbation]:
        """Perturbations by layer, as `lpa_step` takes them."""
        # Equal class counts: the cost does not depend on them.
        rule = build.assignment(
            assignment=self.assignment, counts=[setting.batch_size] * setting.num_classes
        )
        perturbation = lpa_jax.lpa(
            step_cost.RADIUS,
            self.steps,
            assignment=rule,
            mode=self.mode,
            geometry=self.geometry,
            shape=self.shape,
            memory_limit=None,  # the compiler finds out whether it fits
        )
        return {self.layer: perturbation}

    def __str__(self):
        steps = f":{self.steps}" if self.mode == "cold" else ""
        return f"lpa:{self.mode}{steps} at {self.layer}, {self.shape}"


class Result(NamedTuple):
    """One method in one setting, compiled.

    Attributes:
      setting, method: what was compiled.
      layers: the network's injection points from the input to the logits.
      row: shape of the row of one class in the class table.
      memory: bytes of memory of a device.
      erm, gradient_pass, program: plain training, one gradient pass above the layer, the method.
    """

    setting: tpu.Setting
    method: Method
    layers: Sequence[str]
    row: tuple[int, ...]
    memory: int
    erm: tpu.Program
    gradient_pass: tpu.Program
    program: tpu.Program

    @property
    def refused(self) -> bool:
        """Whether the compiler refused one of the programs."""
        return any(p.refused for p in (self.erm, self.gradient_pass, self.program))

    @property
    def floor(self) -> float:
        """FLOP floor of the method relative to ERM, see `experiments.benchmark`."""
        return step_cost.floor_ratio(self.erm.flops, self.gradient_pass.flops, self.method.passes)


class Check(NamedTuple):
    """A promise, whether the compiled program keeps it, and the evidence."""

    claim: str
    passed: bool
    seen: str


def checks(result: Result) -> list[Check]:
    """Checks all promises; of refused programs and of `mesh_step` only that of the memory."""
    found = [
        _fits("ERM", result.erm, result.memory),
        _fits("the method", result.program, result.memory),
    ]
    if result.refused or result.setting.placement != "pmap":
        return found
    method, erm, own = result.method, result.erm.contractions, result.program.contractions
    below = result.layers[: result.layers.index(method.layer) + 1]
    passes = Counter()
    for key, count in result.gradient_pass.contractions.items():
        forward = method.forward_passes if key[1] == hlo.FORWARD else 0
        passes[key] = count * (method.passes + forward)

    def compare(claim, what, choose, extra):
        return _compare(claim, what, _part(erm, choose) + extra, _part(own, choose))

    exchange = class_exchange(result.setting, method, result.row)
    return [
        *found,
        compare(
            "PGD forms no parameter gradients",
            "weight gradients",
            lambda layer, role: role == hlo.WEIGHT_GRADIENT,
            Counter(),
        ),
        compare(
            "encode is not recomputed",
            "convolutions and products up to the layer",
            lambda layer, role: layer in below,
            Counter(),
        ),
        compare(
            f"decode runs for PGD as often as its steps need it ({method.passes})",
            "convolutions and products above the layer",
            lambda layer, role: layer not in below and role != hlo.WEIGHT_GRADIENT,
            passes,
        ),
        _compare(
            "beyond ERM, devices exchange the class table and nothing else",
            "arrays",
            _exchanged(result.erm) + Counter(map(_flat, exchange)),
            _exchanged(result.program),
        ),
    ]


def class_exchange(setting: tpu.Setting, method: Method, row: tuple[int, ...]) -> list[hlo.Array]:
    """The arrays that devices exchange in a step of the method and not in one of ERM.

    Args:
      setting: gives C and the global batch.
      method: gives K, the half-space and the assignment.
      row: shape of the row of one class in the class table.
    """
    classes = hlo.Array("f32", (setting.num_classes,))
    slots = min(setting.num_classes, setting.batch_size)
    table = hlo.Array("f32", (slots, *row))
    # Mode free exchanges one table, of the gradient of the training pass.
    arrays = [table] * max(method.passes, 1)
    arrays += [table] if method.geometry != "free" else []
    arrays += [classes, hlo.Array("f32", ())]
    if method.assignment == "confidence":
        arrays += [classes]
    return arrays


def _fits(name: str, program: tpu.Program, memory: int) -> Check:
    claim = f"{name} fits the memory of a device"
    if program.refused:
        return Check(claim, False, program.refused)
    needed = program.memory_bytes
    seen = f"{needed / tpu.GIB:.2f} of {memory / tpu.GIB:.2f} GiB"
    return Check(claim, needed <= memory, seen)


def _part(contractions: Counter, choose: Callable[[str, str], bool]) -> Counter:
    return Counter({key: count for key, count in contractions.items() if choose(*key[:2])})


def _exchanged(program: tpu.Program) -> Counter:
    return Counter(_flat(array) for exchange in program.collectives for array in exchange.arrays)


def _flat(array: hlo.Array) -> tuple[str]:
    """Type and number of elements; the compiler may change the shape of an exchanged array."""
    return (str(hlo.Array(array.dtype, (array.size,))),)


def _compare(claim: str, what: str, expected: Counter, seen: Counter) -> Check:
    text = f"{seen.total()} {what}"
    if expected != seen:
        text += f", {expected.total()} expected"
    for word, difference in (("beyond", seen - expected), ("missing", expected - seen)):
        if difference:
            listed = (f"{n} x {' '.join(key)}" for key, n in sorted(difference.items()))
            text += f"; {word}: {', '.join(listed)}"
    return Check(claim, expected == seen, text)
