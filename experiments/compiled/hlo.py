"""Reads the text of a compiled XLA program: instructions, collectives, convolutions and products.

    instructions = executed(compiled.as_text())
    sum(collective.bytes for collective in collectives(instructions))

A fused computation counts once for every fusion that calls it, the body of a loop once. The part of
backpropagation of a convolution or matrix product follows from the dimension that it sums over (TPU
programs hold matrix products as convolutions without a window):

    forward           over the weight's inputs:      bf_io->bf,  b01f_01io->b01f
    input gradient    over the weight's outputs:     bf_oi->bf,  b01f_01oi->b01f
    weight gradient   over the batch, first in both: fb_io->bf,  f01b_i01o->01bf
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "forward", "input gradient", "weight gradient"
OTHER = "other"

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)$")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<dims>[\d,]*)\]")
_CALLS = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(?:\{(?P<several>[^}]*)\}|%?(?P<one>[\w.-]+))"
)
_LABELS = re.compile(r"\bdim_labels=(?P<left>\w+)_(?P<right>\w+)->\w+")
_DOT = re.compile(r"\blhs_contracting_dims=\{(\d+)\}, rhs_contracting_dims=\{(\d+)\}")
_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')


class Array(NamedTuple):
    """Type and dimensions of an array, as in f32[10,64].

    >>> Array("bf16", (10, 64)).bytes
    1280
    """

    dtype: str
    dims: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Array":
        """Reads an array as XLA prints it.

        >>> Array.parse("f32[10,64]")
        Array(dtype='f32', dims=(10, 64))
        """
        return next(_arrays(text))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without padding; types of less than a byte count as one byte."""
        bits = re.search(r"\d+", self.dtype)
        return self.size * max(int(bits[0]) // 8 if bits else 1, 1)

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    """One instruction: its results (several for a tuple) and the text after its operation."""

    name: str
    operation: str
    results: tuple[Array, ...]
    rest: str

    @property
    def op_name(self) -> str:
        """Path of its JAX operation, "" if XLA gives none."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""


class Collective(NamedTuple):
    """One exchange between devices and the arrays that each device gets."""

    kind: str
    arrays: tuple[Array, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its arrays; for an all-reduce, those that each device sends and gets."""
        return sum(array.bytes for array in self.arrays)


class Contraction(NamedTuple):
    """One convolution or matrix product: part in backpropagation, result, JAX operation."""

    role: str
    result: Array
    op_name: str


def executed(text: str) -> list[Instruction]:
    """The instructions that the program runs, those of a called computation once per call.

    Args:
      text: `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if (head := _COMPUTATION.match(line)) is not None:
            current = computations.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
        elif current is not None and (body := _INSTRUCTION.match(line)) is not None:
            current.append(_instruction(body["name"], body["rest"]))
    if entry is None:
        raise ValueError("the HLO text has no ENTRY computation")
    return list(_walk(computations, entry))


def _instruction(name: str, rest: str) -> Instruction:
    """Parses `TYPE operation(operands), attributes`."""
    end = _type_length(rest)
    operation, _, behind = rest[end:].strip().partition("(")
    return Instruction(name, operation, tuple(_arrays(rest[:end])), behind)


def _type_length(text: str) -> int:
    """Length of the type at the start of the text; tuple types hold brackets and spaces."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "({") - (character in ")}")
        if depth == 0 and character == " ":
            return position
    return len(text)


def _arrays(text: str) -> Iterator[Array]:
    for found in _ARRAY.finditer(text):
        yield Array(found["dtype"], tuple(int(d) for d in found["dims"].split(",") if d))


def _walk(computations: dict[str, list[Instruction]], name: str) -> Iterator[Instruction]:
    for instruction in computations.get(name, ()):
        yield instruction
        # The second half of an asynchronous pair names the same computation again.
        if instruction.operation.endswith(("-done", "-update")):
            continue
        for call in _CALLS.finditer(instruction.rest):
            names = [call["one"]] if call["one"] else call["several"].replace("%", "").split(", ")
            for called in names:
                yield from _walk(computations, called)


def collectives(instructions: Iterable[Instruction]) -> list[Collective]:
    """The exchanges between devices.

    An asynchronous exchange counts once: the second half of a pair, or the first link of a chain,
    which TPU programs spread over the fusions that run meanwhile.
    """
    found = []
    chains = set()
    for instruction in instructions:
        kind = instruction.operation.removesuffix("-done")
        if kind not in COLLECTIVES:
            continue
        if (chain := _CHAIN.search(instruction.rest)) is not None:
            if chain[1] in chains:
                continue
            chains.add(chain[1])
        found.append(Collective(kind, instruction.results))
    return found


def contractions(instructions: Iterable[Instruction]) -> list[Contraction]:
    """The convolutions and matrix products."""
    return [
        Contraction(_role(instruction), instruction.results[0], instruction.op_name)
        for instruction in instructions
        if instruction.operation in ("convolution", "dot")
    ]


def _role(instruction: Instruction) -> str:
    if (labels := _LABELS.search(instruction.rest)) is not None:
        left, right = labels["left"], labels["right"]
        if left[0] == "f" and right[0] == "i":
            return WEIGHT_GRADIENT
        if left[0] == "b" and right.endswith("io"):
            return FORWARD
        if left[0] == "b" and right.endswith("oi"):
            return INPUT_GRADIENT
    if (dims := _DOT.search(instruction.rest)) is not None:
        roles = {("0", "0"): WEIGHT_GRADIENT, ("1", "0"): FORWARD, ("1", "1"): INPUT_GRADIENT}
        return roles.get(dims.groups(), OTHER)
    return OTHER


def layer_of(op_name: str, layers: Sequence[str]) -> str:
    """The last of `layers` in the path of a JAX operation, "" if there is none.

    >>> layer_of("jit(step)/transpose(jvp(ResNet))/stage3/block1/conv1", ("stage2", "stage3"))
    'stage3'
    """
    return next((part for part in reversed(op_name.split("/")) if part in layers), "")


def tally(found: Iterable[Contraction], layers: Sequence[str]) -> Counter:
    """Number of contractions of each (layer, role, result without axes of length 1)."""
    tallied = Counter()
    for role, result, op_name in found:
        squeezed = Array(result.dtype, tuple(d for d in result.dims if d != 1))
        tallied[layer_of(op_name, layers), role, str(squeezed)] += 1
    return tallied
