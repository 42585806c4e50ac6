"""What a loss is, and the registry of losses."""

from collections.abc import Callable
from typing import Any

import jax
from numpy.typing import ArrayLike

from lpa_jax.registry import Registry

Loss = Callable[[jax.Array, jax.Array], jax.Array]

_REGISTRY: Registry[Loss] = Registry("loss")
register = _REGISTRY.register
names = _REGISTRY.names


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
