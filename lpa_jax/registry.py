"""Factories by name: how methods, models and optimizers are listed and built."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from lpa_jax import checks

Value = TypeVar("Value")
Factory = TypeVar("Factory", bound=Callable[..., Any])


class Registry(Generic[Value]):
    """Factories of one kind of value, by name.

    Attributes:
      kind: What messages call a value.
      factories: The factories by name.
      hidden: Arguments of factories that are no options.
      describe: (value, text) -> the value, which prints as that text, if it has no text yet.

    Example:
      >>> shapes = Registry("shape")
      >>> @shapes.register("square")
      ... def square(side=1.0):
      ...     return side**2
      >>> shapes.names(), shapes.options("square"), shapes.create("square", side=3.0)
      (('square',), ('side',), 9.0)
    """

    def __init__(
        self,
        kind: str,
        factories: Mapping[str, Callable[..., Value]] | None = None,
        hidden: tuple[str, ...] = (),
        describe: Callable[[Value, str], Value] | None = None,
    ):
        self.kind = kind
        self.factories: dict[str, Callable[..., Value]] = dict(factories or {})
        self.hidden = hidden
        self.describe = describe
        self._in_order = factories is not None

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """Decorator that enters a factory under `name`.

        Where the registry has `describe`, values print as the call that made them.
        """

        def add(factory: Factory) -> Factory:
            if self.describe is not None:
                factory = self._describing(name, factory)
            self.factories[name] = factory
            return factory

        return add

    def _describing(self, name: str, factory: Factory) -> Factory:
        @functools.wraps(factory)
        def describing(*arguments, **options):
            arguments = [checks.host_number(value) for value in arguments]
            options = {name: checks.host_number(value) for name, value in options.items()}
            value = factory(*arguments, **options)
            given = inspect.signature(factory).bind(*arguments, **options)
            given.apply_defaults()
            return self.describe(value, described(name, given.arguments))

        return describing

    def names(self) -> tuple[str, ...]:
        """All names: in the order of the given factories, sorted if they were registered later."""
        return tuple(self.factories if self._in_order else sorted(self.factories))

    def options(self, name: str) -> tuple[str, ...]:
        """Names of the options that the factory `name` takes.

        Raises:
          ValueError: `name` is unknown.
        """
        return tuple(self.option_types(name))

    def option_types(self, name: str) -> dict[str, Any]:
        """What the factory `name` annotates each of its options with.

        `inspect.Parameter.empty` stands for an option without annotation.

        Raises:
          ValueError: `name` is unknown.
        """
        checks.choice(self.kind, name, self.names())
        parameters = inspect.signature(self.factories[name]).parameters.values()
        return {p.name: p.annotation for p in parameters if p.name not in self.hidden}

    def create(self, name: str, *arguments: Any, **options: Any) -> Value:
        """The value called `name`.

        Args:
          name: One of `names`.
          *arguments: Leading arguments of its factory.
          **options: Its options.

        Raises:
          ValueError: `name` or an option is unknown, or the factory refuses an argument.
        """
        known = self.options(name)[len(arguments) :]
        for option in options:
            checks.choice(f"option of {self.kind} {name!r}", option, known)
        return self.factories[name](*arguments, **options)


def describe(value: Any, text: str) -> Any:
    """The NamedTuple with its `description`, unless it has one."""
    return value if value.description else value._replace(description=text)


def described(name: str, options: Mapping[str, Any]) -> str:
    """A call as text.

    Example:
      >>> described("lpa", {"radius": 0.1, "counts": [1] * 100})
      'lpa(radius=0.1, counts=<100 values>)'
    """
    return f"{name}({', '.join(f'{key}={shown(value)}' for key, value in options.items())})"


def shown(value: Any) -> str:
    """An option's value in a short line: long vectors by their length, traced values as such."""
    if not checks.is_known(value):
        return "<traced>"
    length = np.size(value) if isinstance(value, list | tuple | np.ndarray | jax.Array) else 1
    return f"<{length} values>" if length > 10 else checks.shown(value)
