"""Published tables to compare with, and the commands that would reproduce them.

Each file of `experiments/methods/recipes/*.toml` is one published table: protocol, sources, and for
each setting the exact commands, their cost and the published figures, by method.
"""

import functools
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.methods.data_set_defaults import set_name

FOLDER = pathlib.Path(__file__).parent / "recipes"
# Published figures are for test images, and for networks trained on all images of the protocol.
_OF_ALL: Mapping[str, Any] = {"evaluate_on": "test", "per_class": None, "images_per_domain": None}


class Setting(NamedTuple):
    """One column of a published table.

    Attributes:
      name: of the setting.
      match: settings, by name, of the runs that can be compared, their length among them.
      commands: in the order to run them.
      hours: that they would take on the recipe's hardware.
      estimate: how that was estimated.
      figures: accuracy in per cent, and its standard error where published, by method.
      others: the same for methods that this project does not have.
    """

    name: str
    match: Mapping[str, Any]
    commands: tuple[str, ...]
    hours: float
    estimate: str
    figures: Mapping[str, tuple[float, ...]]
    others: Mapping[str, tuple[float, ...]]


class Recipe(NamedTuple):
    """One published table.

    Attributes:
      title: of the table.
      status: whether it was run here.
      hardware: for which the hours were estimated.
      protocol: of the publication.
      sources: of the figures.
      settings: its columns.
    """

    title: str
    status: str
    hardware: str
    protocol: str
    sources: tuple[str, ...]
    settings: tuple[Setting, ...]


def read(path: pathlib.Path) -> Recipe:
    """A recipe from its file.

    Raises:
      ValueError: a key is missing or too many.
    """
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    try:
        settings = tuple(_setting(**entry) for entry in content.pop("settings"))
        sources = tuple(content.pop("sources"))
        return Recipe(**content, sources=sources, settings=settings)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _setting(*, name, match, commands, hours, estimate, error=None, accuracy=None, others=None):
    """`error` is in per cent, as long-tail papers print it; accuracy otherwise."""
    figures = dict(accuracy or {})
    for method, (mean, *spread) in (error or {}).items():
        figures[method] = (round(100 - mean, 2), *spread)
    commands = tuple(" ".join(command.split()) for command in commands)
    return Setting(name, match, commands, hours, estimate.strip(), figures, others or {})


@functools.cache
def recipes() -> tuple[Recipe, ...]:
    """All recipes of the project."""
    return tuple(read(path) for path in sorted(FOLDER.glob("*.toml")))


def accuracies(settings: Mapping[str, Any]) -> dict[str, str]:
    """Published accuracies in per cent that runs with these settings can be compared with.

    >>> of = {"dataset": "PACS", "model": "resnet50", "train_steps": 5000, "draws": 20}
    >>> accuracies(of)["erm"], accuracies(of | {"draws": 1})
    ('85.50±0.20', {})
    """
    if any(settings.get(name, value) != value for name, value in _OF_ALL.items()):
        return {}
    settings = {**settings, "dataset": set_name(str(settings.get("dataset")))}
    return {
        method: "±".join(f"{value:.2f}" for value in figure)
        for recipe in recipes()
        for setting in recipe.settings
        if all(settings.get(name) == value for name, value in setting.match.items())
        for method, figure in setting.figures.items()
    }
