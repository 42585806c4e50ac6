"""One form of message for every check, and what no check lets through: nan, bool, text, giants."""

import decimal
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import checks

# What is no number, and what no float or int64 holds.
ODD = (None, "0.5", b"1", True, np.bool_(False), [0.5], np.array([0.5]), 1j, {}, 10**400, 10**5000)
NAN = (float("nan"), float("inf"), -float("inf"), np.float32("nan"))


def _message(check, *arguments, **options):
    with pytest.raises(ValueError, match=r"^value must be .+, got .+$") as error:
        check("value", *arguments, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize("value", [*ODD, *NAN, -0.1], ids=lambda value: type(value).__name__)
def test_a_number_is_finite_real_and_no_boolean(value):
    assert "must be finite and >= 0, got" in _message(checks.number, value)
    assert "must be in [0, 1), got" in _message(checks.number, value, high=1.0, open_high=True)


@pytest.mark.parametrize(
    "value", [0, 1.0, np.float32(0.5), np.int8(1)], ids=lambda value: type(value).__name__
)
def test_a_number_is_returned_as_it_was(value):
    assert checks.number("value", jnp.float32(value)).dtype == jnp.float32
    assert checks.number("value", value, 0.0, 1.0) is value
    assert checks.number("value", decimal.Decimal("0.5")) == decimal.Decimal("0.5")


def test_open_bounds_refuse_the_bound_and_closed_ones_do_not():
    assert checks.number("value", 0.0) == 0 and checks.number("value", 1.0, high=1.0) == 1
    assert _message(checks.number, 0.0, open_low=True).endswith("finite and > 0, got 0.0")
    assert _message(checks.number, 1, high=1.0, open_high=True).endswith("in [0, 1), got 1")
    assert _message(checks.number, 0.5, 1.0, 2.0, open_low=True).endswith("in (1, 2], got 0.5")


@pytest.mark.parametrize(
    "value", [*ODD, *NAN, 2.0, np.float64(3), -1, 2**63], ids=lambda value: type(value).__name__
)
def test_an_integer_is_whole_and_fits_64_bits(value):
    assert "must be a whole number >= 0" in _message(checks.integer, value, 0)
    assert "must be a whole number in 0..4, got" in _message(checks.integer, value, 0, 4)


def test_an_integer_becomes_pythons():
    assert type(checks.integer("value", np.int32(7), 0)) is int
    assert type(checks.integer("value", jnp.int32(7), 0)) is int
    assert checks.integer("value", 4, 0, 4) == 4
    assert _message(checks.integer, 2**63, 0).endswith(
        ">= 0 and below 2**63, got 9223372036854775808"
    )


@pytest.mark.parametrize(
    "values",
    [0, (), (4, 0), (4, True), 4, "4", 2.5, (2**63,), np.ones((2, 2), int)],
    ids=lambda value: type(value).__name__,
)
def test_positive_integers_are_one_or_more(values):
    assert "whole number" in _message(checks.positive_integers, values)
    assert checks.positive_integers("value", [4, np.int64(2)]) == (4, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[3, 1]], "a non-empty vector of numbers, got shape (1, 2)"),
        (3, "a non-empty vector of numbers, got shape ()"),
        ((), "a non-empty vector of numbers, got shape (0,)"),
        (("many", "few"), "a vector of numbers known on the host, got tuple"),
        ([1, 10**400], "a vector of numbers known on the host, got list"),
        ((3, 0), "finite and > 0, got 0 at position 1"),
        ((float("nan"), 1), "finite and > 0, got nan at position 0"),
        ((1, float("inf")), "finite and > 0, got inf at position 1"),
    ],
)
def test_a_vector_holds_finite_numbers_above_its_bound(values, message):
    assert message in _message(checks.vector, values, open_low=True)


def test_a_vector_is_float64_and_may_be_bounded_by_nothing():
    assert checks.vector("value", (1, 0)).dtype == np.float64
    assert checks.vector("value", (-1.0, 2.0), -np.inf).tolist() == [-1.0, 2.0]
    assert _message(checks.vector, (1.0, np.inf), -np.inf).endswith("finite, got inf at position 1")


def test_a_choice_lists_what_is_allowed():
    checks.choice("value", "b", ("a", "b"))
    assert _message(checks.choice, "c", {"a": 1, "b": 2}).endswith("one of a, b, got 'c'")


def test_traced_values_pass_and_known_zeros_vanish():
    def traced(strength, labels):
        assert not checks.is_known(strength) and not checks.vanishes(strength)
        checks.check_labels(labels, 2)
        return checks.number("value", strength, 0.0, 1.0)

    assert float(jax.jit(traced)(7.0, jnp.array([5]))) == 7.0
    assert checks.vanishes(0) and checks.vanishes(jnp.zeros(())) and not checks.vanishes(1e-9)


@pytest.mark.parametrize(
    ("check", "values", "message"),
    [
        (checks.label_array, [0, 4], "labels must be in 0..3, got 4 at position 1"),
        (checks.label_array, [0, -1], "labels must be in 0..3, got -1 at position 1"),
        (checks.label_array, [0.0],
         "labels must be a non-empty vector of integers, got shape (1,)"),
        (checks.label_array, [[1]],
         "labels must be a non-empty vector of integers, got shape (1, "),
        (checks.label_array, [], "labels must be a non-empty vector of integers, got shape (0,)"),
        (checks.label_array, [10**30], "labels must be a non-empty vector of integers, got shape"),
        (checks.index_array, [0, 4], "indices must be in 0..3, got 4 at position 1"),
        (checks.index_array, np.uint64([2**63]),
         "indices must be in 0..3, got 9223372036854775808"),
        (checks.check_labels, np.float32([1]), "labels must be integers, got dtype float32"),
        (checks.check_labels, jnp.array([[1, 9]]), "labels must be in 0..3, got 9 at position 1"),
    ],
)  # fmt: skip
def test_labels_and_indices_are_in_range(check, values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check(values, 4)


def test_labels_without_a_number_of_classes_fit_int32():
    assert checks.label_array([0, 2**31 - 1]).dtype == np.int32
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.2147483647, got 2147483648"):
        checks.label_array([2**31])


def test_what_is_shown_is_one_short_line():
    with pytest.raises(ValueError, match=r"^value must be small, got \[\[1\.0, 0\.0.*\.\.\.$"):
        checks.require(False, "value", "small", np.eye(30))
