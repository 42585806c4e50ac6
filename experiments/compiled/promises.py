"""What a step of LPA promises about its compiled program, checked against the compiled text.

Each promise compares multisets: of convolutions and matrix products by layer, part in
backpropagation and result, or of exchanged arrays by type and number of elements.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import lpa_jax
from experiments.compiled import hlo, step_cost, tpu
from experiments.methods import build as assembly
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
        """Passes that only go forward: carry reads the clean confidence, cold has it anyway."""
        return int(self.mode == "carry" and self.assignment == "confidence")

    def perturbations(self, setting: tpu.Setting) -> dict[str, Perturbation]:
        """What `lpa_step` takes."""
        # Equal class counts: there is no training set, and the cost does not depend on them.
        rule = assembly.assignment(
            assignment=self.assignment, counts=[setting.batch_size] * setting.num_classes
        )
        perturbation = lpa_jax.lpa(
            step_cost.RADIUS,
            self.steps,
            assignment=rule,
            mode=self.mode,
            geometry=self.geometry,
            shape=self.shape,
            # Whether it fits is what the compiler is asked.
            memory_limit=None,
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
      row: shape of one class's row in the class table.
      memory: bytes of a device's memory.
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
        """Whether the compiler gave up one of the programs."""
        return any(p.refused for p in (self.erm, self.gradient_pass, self.program))

    @property
    def floor(self) -> float:
        """The FLOP floor of the method over ERM, see `experiments.benchmark`."""
        return step_cost.floor_ratio(self.erm.flops, self.gradient_pass.flops, self.method.passes)


class Check(NamedTuple):
    """A promise, whether the compiled program keeps it, and what was seen."""

    claim: str
    passed: bool
    seen: str


def checks(result: Result) -> list[Check]:
    """All promises; those about the program's text only where there is one."""
    found = [
        _fits("ERM", result.erm, result.memory),
        _fits("the method", result.program, result.memory),
    ]
    if result.refused:
        return found
    method, erm, own = result.method, result.erm.contractions, result.program.contractions
    below = result.layers[: result.layers.index(method.layer) + 1]
    passes = Counter()
    for key, count in result.gradient_pass.contractions.items():
        forward = method.forward_passes if key[1] == hlo.FORWARD else 0
        passes[key] = count * (method.passes + forward)

    def weights(layer, role):
        return role == hlo.WEIGHT_GRADIENT

    def encode(layer, role):
        return layer in below

    def decode(layer, role):
        return layer not in below and role != hlo.WEIGHT_GRADIENT

    exchange = class_exchange(result.setting, method, result.row)
    return [
        *found,
        _compare(
            "PGD forms no parameter gradients",
            "weight gradients",
            _part(erm, weights),
            _part(own, weights),
        ),
        _compare(
            "encode is not recomputed",
            "convolutions and products up to the layer",
            _part(erm, encode),
            _part(own, encode),
        ),
        _compare(
            f"decode runs for PGD as often as its steps need it ({method.passes})",
            "convolutions and products above the layer",
            _part(erm, decode) + passes,
            _part(own, decode),
        ),
        _compare(
            "beyond ERM, devices exchange the class table and nothing else",
            "arrays",
            _exchanged(result.erm) + Counter(map(_flat, exchange)),
            _exchanged(result.program),
        ),
    ]


def class_exchange(setting: tpu.Setting, method: Method, row: tuple[int, ...]) -> list[hlo.Array]:
    """The arrays that a step of the method must exchange beyond those of ERM.

    Args:
      setting: for C and the global batch.
      method: for K, the half-space and the rule.
      row: shape of one class's row in the class table.
    """
    classes = hlo.Array("f32", (setting.num_classes,))
    slots = min(setting.num_classes, setting.batch_size)
    table = hlo.Array("f32", (slots, *row))
    # In mode free the one table is that of the training pass's own gradient.
    arrays = [table] * max(method.passes, 1)
    arrays += [table] if method.geometry != "free" else []
    arrays += [hlo.Array("f32", (slots,)), hlo.Array("f32", ())]
    if slots < setting.num_classes:
        arrays += [classes, hlo.Array("s32", (setting.batch_size,))]
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
    return Counter(
        {
            (layer, role, result): count
            for (layer, role, result), count in contractions.items()
            if choose(layer, role)
        }
    )


def _exchanged(program: tpu.Program) -> Counter:
    return Counter(_flat(array) for exchange in program.collectives for array in exchange.arrays)


def _flat(array: hlo.Array) -> tuple[str]:
    """Type and number of elements: the compiler may exchange an array in another shape."""
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
