"""Factories by name: how perturbations and penalties are listed, asked for options, and built."""

import inspect
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class Registry(Generic[Value]):
    """Factories of one kind of value, by name.

    Attributes:
      kind: what messages call a value.
      factories: the factories by name.

    >>> shapes = Registry("shape")
    >>> @shapes.register("square")
    ... def square(side=1.0):
    ...     return side**2
    >>> shapes.names(), shapes.options("square"), shapes.create("square", side=3.0)
    (('square',), ('side',), 9.0)
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.factories: dict[str, Callable[..., Value]] = {}

    def register(self, name: str) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
        """Decorator that enters a factory under `name`."""

        def add(factory):
            self.factories[name] = factory
            return factory

        return add

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self.factories))

    def options(self, name: str) -> tuple[str, ...]:
        """Names of the options that the factory `name` takes.

        Raises:
          ValueError: unknown `name`.
        """
        return tuple(self.option_types(name))

    def option_types(self, name: str) -> dict[str, Any]:
        """What the factory `name` annotates each of its options with.

        `inspect.Parameter.empty` stands for an option without annotation.

        Raises:
          ValueError: unknown `name`.
        """
        if name not in self.factories:
            raise ValueError(f"unknown {self.kind} {name!r}; known: {', '.join(self.names())}")
        parameters = inspect.signature(self.factories[name]).parameters
        return {option: parameter.annotation for option, parameter in parameters.items()}

    def create(self, name: str, **arguments: Any) -> Value:
        """Builds a value by name.

        Raises:
          ValueError: unknown `name` or an option that its factory does not have.
        """
        unknown = sorted(set(arguments) - set(self.options(name)))
        if unknown:
            raise ValueError(
                f"{self.kind} {name!r} has no option {unknown[0]!r}; "
                f"it has: {', '.join(self.options(name))}"
            )
        return self.factories[name](**arguments)
