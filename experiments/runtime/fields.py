"""Settings that are written once: a dataclass field says its default, help and bounds.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Example:
        epochs: int = setting(60, "Passes over the training set.", low=1, high=10**6)

`define` makes a command-line flag of every such field, `read` makes an instance from the parsed
flags, and `check` refuses values that are out of bounds, by the name of the flag.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments.runtime import files
from lpa_jax import checks

FLAGS = flags.FLAGS
# Bound of numbers that have no closer one: float32 holds their squares.
MOST = 1e9
_SAME = object()
_KEY = "setting"
# Groups of flags in the order of --help, and the group of each flag that is not in the first.
GROUPS = (
    "what to compare",
    "data",
    "model",
    "training",
    "LPA",
    "search",
    "measuring",
    "saving",
    "machines",
)
_GROUP_OF: dict[str, str] = {}
# Names of flags of other programs and experiments, and the flag that is meant.
_MEANT: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the metadata of a field say.

    Attributes:
      help: of the flag.
      low: smallest value of a number; 0 for whole numbers that have none.
      high: largest value.
      above: bound that the value exceeds, in place of `low`.
      below: bound that the value stays under, in place of `high`.
      allowed: the values, or a function that returns them.
      flag: name of the flag, where it is not the field's.
      flag_default: default of the flag, where it is not the field's; None means not given.
      parse: from the value of the flag to that of the field, where they differ.
      nonempty: whether a list must have a member.
      repeated: whether the flag is given once for each member, not as a list with commas.
      path: whether it is a path, in which the flag understands `~`.
      group: of the flag in --help; unset: `GROUP` of the dataclass, else the first.
      instead_of: names of flags for which people mean this one.
      later: whether the field came after the first runs: their configurations lack it, so that
        it is not written at its default.
    """

    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    allowed: Sequence[str] | Callable[[], Sequence[str]] | None = None
    flag: str | None = None
    flag_default: Any = _SAME
    parse: Callable[[Any], Any] | None = None
    nonempty: bool = False
    repeated: bool = False
    path: bool = False
    group: str | None = None
    instead_of: tuple[str, ...] = ()
    later: bool = False


class _Field(NamedTuple):
    """A field, its `Setting` and its type; length of a tuple of that type, 0 if it may vary."""

    name: str
    flag: str
    default: Any
    about: Setting
    kind: type
    length: int | None

    @property
    def allowed(self) -> Sequence[str] | None:
        allowed = self.about.allowed
        return list(allowed() if callable(allowed) else allowed) if allowed is not None else None


def setting(default: Any, help: str, **about: Any) -> Any:
    """A dataclass field with what `Setting` says of it."""
    return dataclasses.field(default=default, metadata={_KEY: Setting(help, **about)})


def changed(of: type, name: str, default: Any, **about: Any) -> Any:
    """The field of a parent class with another default, and what else differs."""
    known = of.__dataclass_fields__[name].metadata[_KEY]
    metadata = {_KEY: dataclasses.replace(known, **about)}
    return dataclasses.field(default=default, metadata=metadata)


def define(of: type, **defaults: Any) -> None:
    """Defines a flag for every setting of a dataclass.

    Args:
      of: the dataclass.
      **defaults: of flags, by name, where they are not the fields'.
    """
    makers = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    for field in _fields(of):
        usual = field.default if field.about.flag_default is _SAME else field.about.flag_default
        name, default = field.flag, defaults.get(field.flag, usual)
        place(field.about.group or getattr(of, "GROUP", GROUPS[0]), name)
        _MEANT.update(dict.fromkeys(field.about.instead_of, name))
        if field.about.repeated:
            flags.DEFINE_multi_string(name, list(default), field.about.help)
        elif field.about.path:
            files.define_path(name, default, field.about.help, optional=default == "")
        elif field.length is not None:
            texts = [f"{one:g}" if isinstance(one, float) else str(one) for one in default]
            flags.DEFINE_list(name, texts, field.about.help)
        elif field.allowed is not None:
            flags.DEFINE_enum(name, default, field.allowed, field.about.help)
        else:
            makers.get(field.kind, flags.DEFINE_string)(name, default, field.about.help)


def place(group: str, *names: str) -> None:
    """Puts flags into a group of --help."""
    _GROUP_OF.update(dict.fromkeys(names, group))


def group_of(name: str) -> str:
    """The group of a flag in --help."""
    return _GROUP_OF.get(name, GROUPS[0])


def meant(name: str) -> str:
    """What an error adds about a flag that is called otherwise here, or nothing."""
    flag = _MEANT.get(name)
    return f". Did you mean: {flag} ?" if flag in FLAGS else ""


def read(of: type, **values: Any) -> Any:
    """An instance of a dataclass from the parsed flags; a flag that is None takes the default.

    Args:
      of: the dataclass.
      **values: of fields, by name, that are not read from flags.

    Raises:
      ValueError: a flag that is no list of numbers, or that its parser refuses.
    """
    for field in _fields(of):
        value = None if field.name in values else FLAGS[field.flag].value
        if value is not None:
            values[field.name] = _parsed(field, value)
    return of(**values)


def check(settings: Any) -> None:
    """Refuses a value that is out of the bounds of its field.

    Raises:
      ValueError: one line naming the first flag whose value is.
    """
    for field in _fields(type(settings)):
        value = getattr(settings, field.name)
        several = field.length is not None
        members = value if several else (value,)
        if several and field.about.nonempty and not members:
            raise ValueError(f"--{field.flag} must name at least one")
        if several and field.length and len(members) != field.length:
            raise ValueError(f"--{field.flag} must be {field.length} numbers, got {value!r}")
        for member in members:
            if member is not None:
                _check(field, member)


def check_value(of: type, name: str, value: Any) -> None:
    """Refuses a value that is out of the bounds of a field of a dataclass.

    Raises:
      ValueError: naming the field's flag.
    """
    (field,) = (field for field in _fields(of) if field.name == name)
    _check(field, value)


def left_out(settings: Any) -> list[str]:
    """Names of `later` fields at their defaults, which a configuration does not hold."""
    return [
        field.name
        for field in _fields(type(settings))
        if field.about.later and getattr(settings, field.name) == field.default
    ]


def flag_names(of: type) -> list[str]:
    """Names of the flags that `define` makes of a dataclass."""
    return [field.flag for field in _fields(of)]


def named(flag: str, build: Callable[[], Any]) -> Any:
    """What `build` returns; the message of its ValueError begins with the flag."""
    try:
        return build()
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from None


def among(flag: str, texts: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """Values of a list flag that are all among the allowed ones.

    Raises:
      ValueError: there is none, or one is not allowed.
    """
    for text in texts or [""]:
        checks.choice(f"--{flag}", text, allowed)
    return list(texts)


def _fields(of: type) -> Iterator[_Field]:
    hints = typing.get_type_hints(of)
    for field in dataclasses.fields(of):
        if _KEY in field.metadata:
            about, hint, length = field.metadata[_KEY], hints[field.name], None
            if isinstance(hint, types.UnionType):
                (hint,) = {*typing.get_args(hint)} - {types.NoneType}
            if typing.get_origin(hint) is tuple:
                hint, *others = typing.get_args(hint)
                length = 0 if others == [...] else 1 + len(others)
            yield _Field(field.name, about.flag or field.name, field.default, about, hint, length)


def _parsed(field: _Field, value: Any) -> Any:
    if field.about.parse is not None:
        return named(field.flag, lambda: field.about.parse(value))
    if field.length is None:
        return value
    try:
        return tuple(field.kind(text) for text in value)
    except ValueError:
        kind = "whole numbers" if field.kind is int else "numbers"
        raise ValueError(f"--{field.flag} must be {kind}, got {','.join(value)!r}") from None


def _check(field: _Field, value: Any) -> None:
    about, name = field.about, f"--{field.flag}"
    if field.allowed is not None:
        checks.choice(name, value, field.allowed)
    elif field.kind is int:
        lowest, largest = about.low or 0, about.high or checks.LARGEST
        checks.integer(name, value, lowest, largest)
    elif field.kind is float:
        low = about.low if about.above is None else about.above
        low = -math.inf if low is None else low
        high = about.high if about.below is None else about.below
        if high is None:
            high = MOST if value > MOST else math.inf
        opened = {"open_low": about.above is not None, "open_high": about.below is not None}
        checks.number(name, value, low, high, **opened)
