"""Packages that the extra `data` of this package installs, imported where they are first used."""

import importlib
from typing import Any


def package(name: str) -> Any:
    """Import a module of an optional package.

    Args:
      name: The module's full name, such as `PIL.Image`.

    Returns:
      The module.

    Raises:
      ModuleNotFoundError: The package, or one that it needs, is not installed.

    Example:
      >>> package("a_package_that_nobody_has")
      Traceback (most recent call last):
        ...
      ModuleNotFoundError: a_package_that_nobody_has is missing: pip install 'lpa_jax[data]'
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is missing: pip install 'lpa_jax[data]'", name=error.name
        ) from None
