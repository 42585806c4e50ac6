"""How a module switches between training and evaluation: its keyword, and the keyword's value."""

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

# Asks `inject` to find the switch by its name.
FIND = "find"
# Names that modules use for the switch, most common first.
KNOWN = ("train", "training", "is_training", "is_train", "deterministic", "use_running_average")
_HINT = re.compile(r"train|eval|determin|infer|mode|phase|running_average")
_ON_IN_EVALUATION = re.compile(r"eval|determin|infer|test|predict|frozen|running_average")


class Switch(NamedTuple):
    """The keyword of `__call__` that switches a module's mode.

    Attributes:
      name: The keyword, or None: the module has none, or none that is known.
      known: Whether `name` is certain. Otherwise `**kwargs`, or keywords without a known meaning,
        could hold the switch, and a training pass must not depend on it.
      is_field: Whether `name` is a field of the module instead of a keyword of `__call__`.
      by_default: Whether nobody said that there is no switch; `__call__` merely has none.
    """

    name: str | None
    known: bool = True
    is_field: bool = False
    by_default: bool = False

    def keywords(self, train: bool) -> dict[str, bool]:
        """The keyword and its value in training or evaluation mode.

        Example:
          >>> Switch("is_train").keywords(True), Switch("deterministic").keywords(True)
          ({'is_train': True}, {'deterministic': False})
        """
        if self.name is None:
            return {}
        return {self.name: train != bool(_ON_IN_EVALUATION.search(self.name))}


def find_switch(module: Any, train_argument: str | None, arguments: Mapping[str, Any]) -> Switch:
    """Finds a module's switch, and checks the keywords that the user gives for `__call__`.

    Args:
      module: A Linen or NNX module.
      train_argument: The switch, None for a module without one, or `FIND`.
      arguments: Further keywords of `__call__`.

    Raises:
      ValueError: A keyword that `__call__` does not take, or a switch that cannot be determined.
    """
    kind = type(module).__name__
    parameters = dict(inspect.signature(type(module).__call__).parameters)
    parameters.pop("self", None)
    fields = getattr(module, "__dataclass_fields__", {})
    takes = f"it takes: {', '.join(parameters)}"
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in arguments:
        if name not in parameters and not takes_any:
            raise ValueError(f"option {name!r} is not an argument of {kind}; {takes}")
    if train_argument is None:
        return Switch(None)
    if train_argument != FIND:
        if train_argument in parameters or takes_any:
            return Switch(train_argument)
        if train_argument in fields:
            return Switch(train_argument, is_field=True)
        raise ValueError(f"train_argument {train_argument!r} is not an argument of {kind}; {takes}")
    found = next((name for name in KNOWN if name in parameters), None)
    if found is not None:
        return Switch(found)
    free = [p for p in list(parameters.values())[1:] if p.name not in arguments and _is_flag(p)]
    hinted = [p.name for p in free if _HINT.search(p.name)]
    hinted += [name for name in KNOWN if name in fields]
    if hinted:
        raise unknown_switch(module, f"{hinted[0]!r} could be it")
    known = not takes_any and not any(p.default is not None for p in free)
    return Switch(None, known, by_default=True)


def check_mode_property(module: Any) -> None:
    """Raises ValueError if a module reads its mode from its surroundings, by a property."""
    members = {name: inspect.getattr_static(type(module), name, None) for name in KNOWN}
    for name, member in members.items():
        if hasattr(member, "__get__") and not callable(member):
            raise ValueError(
                f"call must set the mode that {type(module).__name__}.{name} reads, or "
                "train_argument must be None if it has none, got neither"
            )


def unknown_switch(module: Any, reason: str) -> ValueError:
    """The error where a module's mode matters and its switch is not known."""
    return ValueError(
        f"train_argument must name the switch of {type(module).__name__} between training and "
        f"evaluation, or be None if it has none, got neither: {reason}"
    )


def _is_flag(parameter: inspect.Parameter) -> bool:
    if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return False
    default = parameter.default
    return default in (parameter.empty, None) or isinstance(default, bool | str)
