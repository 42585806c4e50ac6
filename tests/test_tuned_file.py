"""Files of tuned hyperparameters: what is refused in them, and what a table says of them."""

import json
import re

import pytest

from experiments import methods, tuned_file


def write(path, chosen, method="lpa", **entry):
    content = {"methods": {method: {"chosen": chosen, **entry}}}
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("lpa.radius", "big", "lpa.radius must be a number, got 'big'"),
        ("lpa.radius", None, "lpa.radius must be a number, got None"),
        ("lpa.radius", True, "lpa.radius must be a number, got True"),
        ("lpa.radius", [0.1], "lpa.radius must be a number, got [0.1]"),
        ("lpa.layer", 3, "lpa.layer must be text, got 3"),
        ("lpa.assignment", 2, "lpa.assignment must be text, got 2"),
        ("lpa.split", "x", "lpa.split must be a number, got 'x'"),
        ("lpa.steps", "few", "lpa.steps must be a number or null, got 'few'"),
        ("learning_rate", "fast", "learning_rate must be a number, got 'fast'"),
        ("lpa.nonsense", 1, "has no option 'lpa.nonsense'"),
        ("batch_size", 8, "has no option 'batch_size'"),
    ],
)
def test_a_wrong_option_is_one_line_with_file_method_and_option(tmp_path, key, value, expected):
    path = write(tmp_path / "found.json", {key: value})
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        tuned_file.load(path)
    assert f"--hparams: {str(path)!r}: lpa" in str(error.value)
    assert "\n" not in str(error.value)


def test_options_of_single_test_domains_are_checked_as_well(tmp_path):
    by_domain = {"d0": {"options": {"batch_size": "many"}}}
    path = write(tmp_path / "found.json", {}, by_test_domain=by_domain)
    with pytest.raises(ValueError, match=r"found\.json': lpa: batch_size must be a number, got"):
        tuned_file.load(path, methods.DOMAIN_RUN_OPTIONS)
    path = write(tmp_path / "found.json", {}, by_test_domain={"d0": 3})
    with pytest.raises(ValueError, match="is not a file written by"):
        tuned_file.load(path, methods.DOMAIN_RUN_OPTIONS)


def test_an_unknown_method_is_named_with_its_file(tmp_path):
    path = write(tmp_path / "found.json", {}, method="lpz")
    with pytest.raises(ValueError, match=r"--hparams: .*found\.json': unknown method 'lpz'"):
        tuned_file.load(path)
