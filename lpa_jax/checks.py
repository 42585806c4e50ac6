"""Checks of arguments on the host, with one form of error: `NAME must be ALLOWED, got VALUE`.

Every check returns its value or raises a ValueError of one line. A traced value (a radius or rate
that is an argument of a compiled step) cannot be read on the host: it passes and is used as it is.
"""

import difflib
import inspect
import math
import operator
import re
from collections.abc import Iterable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

# The largest integer of NumPy and JAX. Anything larger overflows somewhere behind the check.
LARGEST = 2**63 - 1


def is_known(value: Any) -> bool:
    """Whether the host can read the value, which it cannot while jit traces it.

    Example:
      >>> is_known(0.5), jax.eval_shape(lambda x: x if is_known(x) else x[None], 1.0).shape
      (True, (1,))
    """
    return not isinstance(value, jax.core.Tracer)


def host_number(value: Any) -> Any:
    """A known JAX number as a NumPy one, since jit would stage what tests it; others as they are.

    Example:
      >>> host_number(jnp.float32(0.5)), host_number("0.5")
      (np.float32(0.5), '0.5')
    """
    is_scalar = isinstance(value, jax.Array) and is_known(value) and value.ndim == 0
    plain = is_scalar and not jnp.issubdtype(value.dtype, jax.dtypes.extended)
    return np.asarray(value)[()] if plain else value


def vanishes(value: Any) -> bool:
    """Whether the value is known to be 0, which turns a method off bitwise."""
    return is_known(value) and host_number(value) == 0


def require(holds: bool, name: str, allowed: str, value: Any) -> None:
    """Raises ValueError unless the condition holds.

    Example:
      >>> require(False, "low", "below high", 3.0)
      Traceback (most recent call last):
        ...
      ValueError: low must be below high, got 3.0
    """
    if not holds:
        _refuse(name, allowed, shown(value))


def require_kind(holds: bool, name: str, allowed: str, value: Any) -> None:
    """Like `require`, but the error names the type of the value in its place."""
    if not holds:
        _refuse(name, allowed, type(value).__name__)


def instance(name: str, value: Any, kind: Any, allowed: str) -> None:
    """Raises ValueError, naming the type of the value, unless it is of a kind as for isinstance."""
    require_kind(isinstance(value, kind), name, allowed, value)


def function(name: str, value: Any, *arguments: str) -> None:
    """Raises ValueError unless the value can be called with these arguments, by position.

    Example:
      >>> function("loss", lambda gamma: None, "logits", "targets")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
        ...
      ValueError: loss must be a function of (logits, targets), got <function ...
    """
    try:
        inspect.signature(value).bind(*arguments)
    except TypeError:
        _refuse(name, f"a function of ({', '.join(arguments)})", shown(value))
    except ValueError:  # a function of C has no signature
        pass


def key(name: str, value: Any) -> None:
    """Raises ValueError unless the value is one random key, of either kind that JAX has."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", ())
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    fits = shape == () if typed else dtype == np.uint32 and len(shape) == 1
    require(fits, name, "a random key such as jax.random.key(0)", value)


def array(name: str, value: Any) -> jax.Array:
    """The value as a JAX array, if it holds numbers."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        _refuse(name, "an array of numbers", shown(value))


def number(
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> Any:
    """The value, if it is traced or a finite real number between two bounds; JAX's as NumPy's.

    Args:
      name: What the error calls it.
      value: A Python, NumPy or JAX scalar; no boolean.
      low: Least value allowed.
      high: Largest value allowed; infinity itself is never allowed.
      open_low: Whether `low` itself is refused.
      open_high: Whether `high` itself is refused.

    Raises:
      ValueError: The value is no such number.

    Example:
      >>> number("rate", 0.5, 0.0, 1.0, open_high=True)
      0.5
      >>> number("radius", float("nan"))
      Traceback (most recent call last):
        ...
      ValueError: radius must be finite and >= 0, got nan
    """
    if not is_known(value):
        return value
    value = host_number(value)
    known = real(value)
    above = known > low if open_low else known >= low
    below = known < high if open_high else known <= high
    allowed = f"in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    if high == math.inf:
        allowed = _at_least(low, open_low)
    require(math.isfinite(known) and above and below, name, allowed, value)
    return value


def real(value: Any) -> float:
    """The value as a float; nan for what is no real scalar, infinity for what is too large."""
    try:
        unfit = isinstance(value, str | bytes) or np.ndim(value) or np.asarray(value).dtype == bool
        return math.nan if unfit else float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return math.nan


def integer(name: str, value: Any, minimum: int, maximum: int = LARGEST) -> int:
    """The value as a Python int, if it is an integer between two bounds.

    Raises:
      ValueError: The value is a boolean, no Python or NumPy integer, or out of bounds.

    Example:
      >>> integer("batch_size", np.int64(8), minimum=1)
      8
      >>> integer("steps", 2.5, minimum=0)
      Traceback (most recent call last):
        ...
      ValueError: steps must be a whole number >= 0, got 2.5
    """
    try:
        index = minimum - 1 if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        index = minimum - 1
    allowed = f">= {minimum}" if index <= LARGEST else f">= {minimum} and below 2**63"
    if maximum < LARGEST:
        allowed = f"in {minimum}..{maximum}"
    require(minimum <= index <= maximum, name, f"a whole number {allowed}", value)
    return index


def positive_integers(name: str, values: Any) -> tuple[int, ...]:
    """The values as a tuple of ints; ValueError unless they are one or more integers >= 1."""
    try:
        whole = tuple(integer(name, value, minimum=1) for value in values)
    except (TypeError, ValueError):
        whole = ()
    require(bool(whole), name, "one or more whole numbers >= 1", values)
    return whole


def choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises ValueError unless the value is among those allowed; names the nearest spelling.

    Example:
      >>> choice("norm", "l1", ("l2", "linf"))
      Traceback (most recent call last):
        ...
      ValueError: norm must be one of l2, linf, got 'l1'
      >>> choice("loss", "facol", ("focal", "ldam"))
      Traceback (most recent call last):
        ...
      ValueError: loss must be one of focal, ldam, got 'facol' (did you mean 'focal'?)
    """
    allowed = tuple(allowed)
    if value in allowed:
        return
    listed = f"one of {', '.join(map(str, allowed))}" if allowed else "none at all"
    _refuse(name, listed, shown(value) + nearest(value, allowed))


def nearest(value: Any, known: Iterable[Any]) -> str:
    """What an error adds about a misspelt name: ` (did you mean 'NAME'?)`, or nothing.

    Example:
      >>> nearest("CIFAR10", ["cifar10", "cifar100"]), nearest("lap", ["lpl", "lpa"])
      (" (did you mean 'cifar10'?)", " (did you mean 'lpa'?)")
    """
    if not isinstance(value, str):
        return ""
    known = [str(name) for name in known]
    # Other capitals come first, then letters in another order: of 'lap', 'lpl' is as near as 'lpa'.
    near = [name for name in known if name.lower() == value.lower()]
    near = near or [name for name in known if sorted(name) == sorted(value)]
    near = near or difflib.get_close_matches(value, known, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def vector(name: str, values: ArrayLike, low: float = 0.0, *, open_low: bool = False) -> np.ndarray:
    """The values as float64 [N], if they are one or more finite numbers of at least `low`.

    Raises:
      ValueError: The values are no such vector, or traced.

    Example:
      >>> vector("counts", [3, 0], open_low=True)
      Traceback (most recent call last):
        ...
      ValueError: counts must be finite and > 0, got 0 at position 1
    """
    try:
        if np.asarray(values).dtype.kind in "bSU":
            raise TypeError
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        _refuse(name, "a vector of numbers known on the host", type(values).__name__)
    if array.ndim != 1 or array.size == 0:
        _refuse(name, "a non-empty vector of numbers", f"shape {array.shape}")
    bad = np.flatnonzero(~(np.isfinite(array) & (array > low if open_low else array >= low)))
    if bad.size:
        _refuse(name, _at_least(low, open_low), f"{array[bad[0]]:g} at position {bad[0]}")
    return array


def label_array(labels: ArrayLike, num_classes: int | None = None) -> np.ndarray:
    """Labels as a non-empty int32 vector [N] with values in 0..num_classes-1 (None: not negative).

    Raises:
      ValueError: Not a non-empty vector of integers, or a label out of range.

    Example:
      >>> label_array([0, 2, 1], num_classes=3)
      array([0, 2, 1], dtype=int32)
    """
    return _index_vector("labels", labels, num_classes or 2**31).astype(np.int32)


def index_array(indices: ArrayLike, size: int) -> np.ndarray:
    """Indices into `size` examples as a non-empty int64 vector [M].

    Raises:
      ValueError: Not a non-empty vector of integers, or one out of range.

    Example:
      >>> index_array([2, 0], size=3)
      array([2, 0])
    """
    return _index_vector("indices", indices, size).astype(np.int64)


def check_labels(
    labels: ArrayLike, num_classes: int, name: str = "labels", *, may_ignore: bool = False
) -> None:
    """Refuses labels outside 0..num_classes-1, which a device would silently clamp.

    Traced labels have no values to check, so call this where a batch enters, on the host.

    With `may_ignore`, -1 is allowed as well: the label of an example that does not count.

    Raises:
      ValueError: A label is out of range or no integer; the first one and its place are named.

    Example:
      >>> check_labels(np.array([0, 3]), num_classes=3)
      Traceback (most recent call last):
        ...
      ValueError: labels must be in 0..2, got 3 at position 1
    """
    if not is_known(labels):
        return
    values = np.asarray(labels)
    if values.ndim > 1 and values.dtype.kind in "bf" and np.array_equal(values, np.trunc(values)):
        values = values.astype(np.int64)  # 0 and 1 for each of several classes
    values = values.reshape(-1)
    if not np.issubdtype(values.dtype, np.integer):
        _refuse(name, "integers", f"dtype {values.dtype}")
    bad = np.flatnonzero((values < (-1 if may_ignore else 0)) | (values >= num_classes))
    if bad.size:
        allowed = f"in 0..{num_classes - 1}{' or -1' if may_ignore else ''}"
        _refuse(name, allowed, f"{values[bad[0]]} at position {bad[0]}")


def shown(value: Any) -> str:
    """The value in one line of at most 200 characters, as errors show it."""
    if hasattr(value, "tolist") and not isinstance(value, type) and is_known(value):
        value = value.tolist()
    try:
        text = re.sub(r"\s*\n\s*", " ", repr(value))
    except ValueError:  # Python writes out no integer of more than 4300 digits
        text = "an integer of more than 4300 digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _index_vector(name: str, values: ArrayLike, limit: int) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        got = f"shape {array.shape} and dtype {array.dtype}"
        _refuse(name, "a non-empty vector of integers", got)
    check_labels(array, limit, name)
    return array


def _at_least(low: float, is_open: bool) -> str:
    return "finite" if low == -math.inf else f"finite and {'>' if is_open else '>='} {low:g}"


def _refuse(name: str, allowed: str, got: str) -> NoReturn:
    raise ValueError(f"{name} must be {allowed}, got {got}")
