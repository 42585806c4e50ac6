"""Settings that are written once: what their flags, their reading and their bounds promise."""

import dataclasses
import math
import re

import pytest
from absl import flags

from experiments.domains.settings import DomainSettings
from experiments.images.settings import Settings
from experiments.measuring.settings import Measuring
from experiments.methods.flags import Perturbing
from experiments.runtime import fields
from experiments.runtime.hosts import Hosts
from experiments.training.log import Logging
from experiments.training.saving import Saving
from experiments.training.search_loop import Search
from tests.helpers.module_call import forget_flags

FLAGS = flags.FLAGS
EVERY = (Settings, DomainSettings, Perturbing, Saving, Logging, Hosts, Search, Measuring)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parent:
    epochs: int = fields.setting(60, "Passes over the data.", low=1, high=100)
    rate: float = fields.setting(0.1, "Learning rate.", flag_default=None, above=0)
    sizes: tuple[int, ...] = fields.setting((1, 2), "Sizes.", low=1, nonempty=True)
    pair: tuple[float, float] = fields.setting((0.5, 1.0), "Two numbers.", low=0)
    color: str = fields.setting("red", "Color.", allowed=lambda: ("red", "blue"))
    every: str | None = fields.setting(None, "Interval.", flag="save_every", parse=str.upper)
    new: bool = fields.setting(False, "Added later.", later=True)
    derived: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Child(Parent):
    epochs: int = fields.changed(Parent, "epochs", 5, help="Passes.")


def parsed(of, *arguments, **defaults):
    try:
        fields.define(of, **defaults)
        FLAGS(["test", *arguments])
        return fields.read(of)
    finally:
        forget_flags()


def test_flags_have_the_defaults_of_the_fields_and_give_them_back():
    assert parsed(Parent) == Parent()
    assert parsed(Child) == Child() and Child().epochs == 5
    assert parsed(Parent, epochs=7).epochs == 7


def test_flags_are_read_as_their_fields_say():
    found = parsed(Parent, "--epochs=9", "--rate=1", "--sizes=3,4", "--pair=0,2", "--color=blue",
                   "--save_every=week", "--new")  # fmt: skip
    expected = {"epochs": 9, "rate": 1.0, "sizes": (3, 4), "pair": (0.0, 2.0), "color": "blue"}
    assert found == Parent(**expected, every="WEEK", new=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "--epochs must be a whole number in 1..100, got 0"),
        ({"rate": 0.0}, "--rate must be finite and > 0, got 0.0"),
        ({"rate": 1e300}, "--rate must be in (0, 1e+09], got 1e+300"),
        ({"sizes": (2, 0)}, "--sizes must be a whole number >= 1, got 0"),
        ({"sizes": ()}, "--sizes must name at least one"),
        ({"pair": (1.0,)}, "--pair must be 2 numbers, got (1.0,)"),
        ({"color": "green"}, "--color must be one of red, blue, got 'green'"),
    ],
)
def test_a_value_out_of_bounds_gets_one_line(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fields.check(Parent(**values))


def test_what_came_later_is_left_out_at_its_default_alone():
    assert fields.left_out(Parent()) == ["new"] and fields.left_out(Parent(new=True)) == []


@pytest.mark.parametrize("of", EVERY)
def test_no_number_is_without_bounds(of):
    def refused(name, value):
        usual = getattr(of(), name)
        many = (value,) * max(len(usual), 1) if isinstance(usual, tuple) else value
        with pytest.raises(ValueError, match=r"^--\w+ must be [^\n]*got"):
            fields.check(dataclasses.replace(of(), **{name: many}))

    numbers = [f.name for f in fields._fields(of) if f.kind in (int, float)]
    assert len(numbers) > 0
    for name in numbers:
        for value in (math.nan, math.inf, -math.inf, 10**25, -(10**25), 1e308):
            refused(name, value)
