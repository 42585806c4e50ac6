"""What the JSON files that the experiments write hold: types, finite numbers and sizes.

Checked where a file is read.

A schema is a `Kind`; a list with the schema of its members, and `...` after it if there must be
one; a tuple of alternatives, of which None is null; or a dictionary of fields. `?` at the end of a
name says that the field may be missing, `*` stands for any end of a name, and the key `...` for all
other fields.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lpa_jax.files import read_bytes

# The largest of these files, the compiled programs of `compile_check`, has some megabytes.
MOST_BYTES = 2**28
_MOST_DEPTH, _MOST_LETTERS = 64, 10**5
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Values of one type: the words for them, and whether a value is one."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    # What float32 holds; whole numbers fit into 64 bits. Both are false for NaN.
    return (type(value) is int and abs(value) < 2**63) or (
        type(value) is float and abs(value) <= _LARGEST
    )


def _is_text(value: Any) -> bool:
    # Half of a surrogate pair cannot be written.
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


ANY = Kind("", lambda value: True)
YES_OR_NO = Kind("true or false", lambda value: isinstance(value, bool))
WHOLE = Kind("a whole number >= 0", lambda value: type(value) is int and 0 <= value < 2**63)
NUMBER = Kind("a finite number", _is_number)
SHARE = Kind("a number between 0 and 1", lambda value: _is_number(value) and 0 <= value <= 1)
TEXT = Kind("printable text", lambda v: isinstance(v, str) and v.isprintable() and len(v) <= 1000)
OBJECT = {...: ANY}
_SHAPES = {
    list: Kind("a list", lambda value: isinstance(value, list)),
    dict: Kind("an object", lambda value: isinstance(value, dict) and all(map(_is_text, value))),
}
_UNKNOWN = Kind("a known field", lambda value: False)
_MISSING = object()


def read(path: pathlib.Path, schema: Any) -> Any | None:
    """Reads a JSON file; None if there is none.

    Raises:
      ValueError: one line that names the file, and the field that is not as the schema says.
    """
    try:
        text = read_bytes(path, MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    try:
        # utf-8-sig, because editors of Windows begin a file with a byte order mark
        content = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # deep nesting exhausts the parser's stack
        raise ValueError(f"{path} is cut short or not JSON") from None
    found = problem(content, schema)
    if found is not None:
        raise ValueError(f"{path}: {found}")
    return content


def read_or_say(path: pathlib.Path, schema: Any, say: Callable[[str], None]) -> Any | None:
    """Reads JSON like `read`; a file that is not as it should be is said to be written again."""
    try:
        return read(path, schema)
    except ValueError as error:
        say(f"{error}: it will be written again")
        return None


def problem(value: Any, schema: Any, name: str = "", depth: int = 0) -> str | None:
    """What in a value is not as a schema says, with the name of the field; None if nothing.

    >>> problem({"curve": [{"epoch": "x"}]}, {"curve": [{"epoch": NUMBER}]})
    'curve[0].epoch must be a finite number, got "x"'
    """
    if isinstance(schema, tuple):
        found = [problem(value, one, name, depth) for one in schema]
        return None if None in found else found[0]
    if schema is None:
        return None if value is None else "null"
    if schema is ANY:
        schema = _schema_of(value)
    kind = _SHAPES.get(type(schema), schema)
    if depth > _MOST_DEPTH:
        return f"{name[:80]} must not be nested so deeply"
    if not kind.holds(value):
        return f"{name or 'it'} must be {kind.words}, got {_short(value)}"
    if isinstance(schema, Kind):
        return None
    if not value and isinstance(schema, list) and ... in schema:
        return f"{name or 'it'} must not be empty"
    parts = (
        _items(value, schema, name) if isinstance(schema, list) else _fields(value, schema, name)
    )
    return next((p for part in parts if (p := problem(*part, depth + 1)) is not None), None)


def _schema_of(value: Any) -> Any:
    """What holds for every value, whatever it means."""
    if isinstance(value, dict):
        return {...: ANY}
    if isinstance(value, list):
        return [ANY]
    if isinstance(value, str):
        return Kind("text in UTF-8", lambda text: _is_text(text) and len(text) <= _MOST_LETTERS)
    return NUMBER if type(value) in (int, float) else Kind("", lambda constant: True)


def _items(value: list, schema: list, name: str) -> Iterator[tuple[Any, Any, str]]:
    return ((item, schema[0], f"{name}[{number}]") for number, item in enumerate(value))


def _fields(value: dict, schema: dict, name: str) -> Iterator[tuple[Any, Any, str]]:
    above = f"{name}." if name else ""
    named = {key.removesuffix("?"): (key, kind) for key, kind in schema.items() if key is not ...}
    for field, (key, kind) in named.items():
        if field in value or (key == field and not key.endswith("*")):
            yield value.get(field, _MISSING), kind, above + field
    for field in sorted(value.keys() - named.keys()):
        begun = (key for key in named if key.endswith("*") and field.startswith(key[:-1]))
        yield value[field], schema.get(next(begun, ...), _UNKNOWN), above + field


def _short(value: Any) -> str:
    if value is _MISSING:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
