"""Factories by name: how methods, models and optimizers are listed and built."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from lpa_jax import checks

Value = TypeVar("Value")
Factory = TypeVar("Factory", bound=Callable[..., Any])


class Registry(Generic[Value]):
    """Factories of one kind of value, by name.

    Attributes:
      kind: What messages call a value.
      factories: The factories by name.
      hidden: Arguments of factories that are no options.

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
    ):
        self.kind = kind
        self.factories: dict[str, Callable[..., Value]] = dict(factories or {})
        self.hidden = hidden
        self._in_order = factories is not None

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """Decorator that enters a factory under `name`."""

        def add(factory: Factory) -> Factory:
            self.factories[name] = factory
            return factory

        return add

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
