"""What a loss is, and the registry of losses."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from numpy.typing import ArrayLike

from lpa_jax import checks
from lpa_jax.registry import Registry

Loss = Callable[[jax.Array, jax.Array], jax.Array]
Factory = TypeVar("Factory", bound=Callable[..., Any])


class NamedLoss:
    """A loss that prints as the call that made it.

    Attributes:
      description: That call.
      one_class: Whether the loss is that of a softmax, for one class an example.
    """

    def __init__(self, loss: Loss, description: str, one_class: bool = False):
        functools.update_wrapper(self, loss)
        self.description, self.one_class = description, one_class
        self._loss = loss

    def __call__(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """Logits and targets [..., C] -> losses [...]."""
        return self._loss(logits, targets)

    def __repr__(self) -> str:
        """The call that made it."""
        return self.description


def check_fits(loss: Loss, several: bool) -> None:
    """Raises ValueError for what is no loss, and one for one class where labels name several."""
    checks.function("loss", loss, "logits", "targets")
    made = loss not in _REGISTRY.factories.values()
    checks.require(made, "loss", "what a factory of losses returns, not the factory", loss)
    if several and getattr(loss, "one_class", False):
        raise ValueError(
            "loss must be one for several classes an example, such as "
            f"losses.sigmoid_cross_entropy(), for labels [B, C] (if they are one-hot, pass their "
            f"argmax), got {loss!r}"
        )


def _described(loss: Loss, description: str) -> Loss:
    return loss if isinstance(loss, NamedLoss) else NamedLoss(loss, description)


_REGISTRY: Registry[Loss] = Registry("loss", describe=_described)
names = _REGISTRY.names


def register(name: str, *, one_class: bool = False) -> Callable[[Factory], Factory]:
    """Decorator that enters a factory of losses under `name`.

    Args:
      name: The loss's name.
      one_class: Whether its losses are for one class an example; labels of several refuse them.
    """

    def add(factory: Factory) -> Factory:
        registered = _REGISTRY.register(name)(factory)
        if not one_class:
            return registered

        @functools.wraps(factory)
        def marked(*arguments, **options):
            loss = registered(*arguments, **options)
            loss.one_class = True
            return loss

        _REGISTRY.factories[name] = marked
        return marked

    return add


def options(name: str) -> tuple[str, ...]:
    """Names of the options of a loss, the class counts left out.

    Raises:
      ValueError: Unknown name.

    Example:
      >>> options("focal")
      ('gamma',)
    """
    return tuple(option_types(name))


def option_types(name: str) -> dict[str, Any]:
    """What a loss annotates each of its options with, the class counts left out.

    Raises:
      ValueError: Unknown name.

    Example:
      >>> option_types("focal")
      {'gamma': <class 'float'>}
    """
    return {key: kind for key, kind in _REGISTRY.option_types(name).items() if key != "counts"}


def create(name: str, counts: ArrayLike | None = None, **arguments: Any) -> Loss:
    """The loss of that name.

    Args:
      name: One of `names`.
      counts: Training examples of each class [C]; left unused by the losses that need none.
      **arguments: Keyword arguments of the factory, such as ``gamma`` for ``focal``.

    Raises:
      ValueError: If name or an option is unknown, counts are needed and missing, or the factory
        refuses an argument.

    Example:
      >>> logits, target = jax.numpy.zeros((1, 2)), jax.numpy.array([[0.0, 1.0]])
      >>> round(float(create("balanced_softmax", counts=[3, 1])(logits, target)[0]), 4)  # log 4
      1.3863
      >>> create("ldam")
      Traceback (most recent call last):
        ...
      ValueError: counts must be given for the loss 'ldam', got None
    """
    if "counts" in _REGISTRY.options(name):
        if counts is None:
            raise ValueError(f"counts must be given for the loss {name!r}, got None")
        arguments["counts"] = counts
    return _REGISTRY.create(name, **arguments)
