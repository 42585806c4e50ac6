"""The outputs of submodules in one pass: which array of an output is cut, and what replaces it."""

import copy
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax.core import FrozenDict, tracers

from lpa_jax.injection.base import LOGITS, Array, untapped

Keys = tuple[int | str, ...]
_MOST_NAMES = 20


class Outputs(Protocol):
    """What a pass hands the outputs of submodules to.

    Attributes:
      tapping: Whether a tap is running: its own passes through the module are not recorded.
    """

    tapping: bool

    def exchange(self, path: str, output: Any) -> Any:
        """What replaces `output`, which submodule `path` has returned."""


class SubmoduleOutputs(Outputs):
    """Records the outputs of named submodules during one pass and replaces the tapped ones.

    Attributes:
      seen: The cut submodules' own activations so far.
    """

    def __init__(
        self,
        paths: Sequence[str],
        taps: Mapping[str, Callable[[Array], Array]],
        select: Mapping[str, Keys],
        inputs: Any,
    ):
        self.seen: dict[str, Array] = {}
        self.tapping = False
        self._paths, self._taps, self._select = paths, taps, select
        self._examples = num_examples(inputs)
        self._called: dict[str, None] = {}
        self._trace = tracers.current_trace()

    def exchange(self, path: str, output: Any) -> Any:
        """What replaces `output`, which submodule `path` has returned.

        Raises:
          ValueError: The output cannot be an injection point.
        """
        if self.tapping:
            return output
        self._called[path] = None
        if path not in self._paths:
            return output
        if path in self.seen:
            raise ValueError(
                f"submodule {path!r} is called more than once in a pass, so it names no single "
                "injection point"
            )
        for other in self._paths[self._paths.index(path) + 1 :]:
            if other in self.seen:
                raise ValueError(
                    f"paths must be in the order of the pass, but {other!r}, named after {path!r}, "
                    "returns before it"
                )
        keys = self._select.get(path)
        keys = _only_activation(path, output, self._examples) if keys is None else keys
        self.seen[path] = part(path, output, keys)
        self._check(path, self.seen[path])
        self.tapping = True
        replaced = self._taps.get(path, untapped)(self.seen[path])
        self.tapping = False
        return with_part(output, keys, replaced)

    def logits(self, output: Any) -> Array:
        """The logits in what the module returns.

        Raises:
          ValueError: It is neither an array nor an output that names or begins with the logits.
        """
        keys = self._select.get(LOGITS)
        if keys is None:
            keys = () if isinstance(output, jax.Array) else _named_or_first(output)
        return part(LOGITS, output, keys)

    def check_seen(self, expected: set[str]) -> None:
        """Raises ValueError unless every submodule of `expected` was called."""
        for path in sorted(expected - set(self.seen)):
            called = f", which calls: {listed(path, self._called)}" if self._called else ""
            raise ValueError(
                f"submodule {path!r} was not called in the pass through the module{called}"
            )

    def _check(self, path: str, activation: Array) -> None:
        if tracers.current_trace() != self._trace:
            raise ValueError(
                f"submodule {path!r} runs inside a scan, vmap, remat or jit, out of which no "
                "activation can be taken: cut the submodule that is transformed itself (remat of "
                "its class or `__call__`, not of a function), between two stacks of layers, or "
                "unroll the scan"
            )
        if self._examples is not None and activation.shape[:1] != (self._examples,):
            raise ValueError(
                f"submodule {path!r} must return the {self._examples} examples along its first "
                f"axis, got {described(activation)}"
            )


def num_examples(inputs: Any) -> int | None:
    """B, the length of the example axis of a pytree of inputs; None without arrays."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)]
    return next((shape[0] for shape in shapes if shape), None)


def is_activation(entry: Any, examples: int | None) -> bool:
    """Whether an entry of an output is an array of floats with the example axis first."""
    if not isinstance(entry, jax.Array) or not jnp.issubdtype(entry.dtype, jnp.floating):
        return False
    return entry.shape[:1] == (examples,) if examples is not None else entry.ndim > 0


def as_keys(select: Any) -> Keys:
    """A value of `select`, one key or several, as a tuple of keys."""
    return select if isinstance(select, tuple) else (select,)


def part(layer: str, output: Any, keys: Keys) -> Array:
    """The array at the keys of a nested output.

    Raises:
      ValueError: There is no such part, or it is no array.
    """
    found = output
    try:
        for key in keys:
            found = _entry(found, key)
    except (KeyError, IndexError, AttributeError, TypeError):
        found = None
    if not isinstance(found, jax.Array):
        got = repr(keys[0]) if len(keys) == 1 else repr(keys)
        raise ValueError(
            f"select[{layer!r}] must name an array in {described(output)}, got {got}"
            if keys
            else _ask(layer, output)
        )
    return found


def with_part(output: Any, keys: Keys, value: Array) -> Any:
    """The output with `value` at the keys.

    Example:
      >>> with_part((1, {"a": 2}), (1, "a"), 3)
      (1, {'a': 3})
    """
    if not keys:
        return value
    key, *rest = keys
    new = with_part(_entry(output, key), tuple(rest), value)
    if isinstance(key, str) and not isinstance(output, Mapping) and hasattr(output, "_replace"):
        return output._replace(**{key: new})
    if isinstance(key, str) and dataclasses.is_dataclass(output):
        return dataclasses.replace(output, **{key: new})
    if isinstance(output, tuple):
        entries = list(output)
        entries[key] = new
        return type(output)(*entries) if hasattr(output, "_fields") else tuple(entries)
    if isinstance(output, FrozenDict):
        return output.copy({key: new})
    changed = copy.copy(output)
    if isinstance(key, int) or isinstance(output, Mapping):
        changed[key] = new
    else:
        setattr(changed, key, new)
    return changed


def described(output: Any) -> str:
    """An output in a few words, for errors.

    Example:
      >>> described((jnp.ones((2, 3)), {"a": None}))
      '(float32[2, 3], {a: None})'
    """
    if hasattr(output, "shape") and hasattr(output, "dtype"):
        return f"{output.dtype}{list(output.shape)}"
    if isinstance(output, tuple | list) and not hasattr(output, "_fields"):
        return f"({', '.join(map(described, output))})"
    if isinstance(output, Mapping):
        entries = (f"{key}: {described(value)}" for key, value in output.items())
        return f"{{{', '.join(entries)}}}"
    return "None" if output is None else type(output).__name__


def listed(wanted: str, names: Iterable[str]) -> str:
    """The names, those most like the wanted one first, at most twenty.

    Example:
      >>> listed("bodi", ["head", "body"])
      'body, head'
    """

    def unlikeness(name):
        return -difflib.SequenceMatcher(None, wanted, name).ratio()

    ordered = sorted(names, key=unlikeness)
    more = len(ordered) - _MOST_NAMES
    return ", ".join(ordered[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _entry(output: Any, key: int | str) -> Any:
    if isinstance(key, str) and not isinstance(output, Mapping):
        return getattr(output, key)
    return output[key]


def _only_activation(path: str, output: Any, examples: int | None) -> Keys:
    """The keys of the activation in an output that leaves no choice."""
    if isinstance(output, jax.Array):
        return ()
    if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(output)):
        raise ValueError(f"submodule {path!r} must return an array, got {described(output)}")
    if isinstance(output, tuple | list):
        candidates = [i for i, entry in enumerate(output) if is_activation(entry, examples)]
        if candidates == [0]:
            return (0,)
    raise ValueError(_ask(path, output))


def _named_or_first(output: Any) -> Keys:
    """The keys of the logits: an entry of that name, or the first entry of a tuple."""
    named = LOGITS in output if isinstance(output, Mapping) else hasattr(output, LOGITS)
    if named:
        return (LOGITS,)
    if isinstance(output, tuple | list) and output and isinstance(output[0], jax.Array):
        return (0,)
    raise ValueError(_ask(LOGITS, output))


def _ask(layer: str, output: Any) -> str:
    whose = "the model's output" if layer == LOGITS else f"the output of {layer!r}"
    several = isinstance(output, tuple | list | Mapping)
    entries = (
        output.items() if isinstance(output, Mapping) else enumerate(output if several else ())
    )
    key = next((key for key, entry in entries if isinstance(entry, jax.Array)), 0)
    return (
        f"select must name the part of {whose} to take, such as select={{{layer!r}: {key!r}}}, "
        f"got none for {described(output)}"
    )
