"""Files of tuned hyperparameters: what is refused in them, and what a table says of them."""

import json
import re

import pytest

from experiments.domains.settings import DomainSettings
from experiments.images.settings import Settings
from experiments.methods import names as methods
from experiments.methods import tuned as tuned_file


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
    with pytest.raises(ValueError, match=r"by_test_domain\.d0 must be an object, got 3"):
        tuned_file.load(path, methods.DOMAIN_RUN_OPTIONS)


def test_an_unknown_method_is_named_with_its_file(tmp_path):
    path = write(tmp_path / "found.json", {}, method="lpz")
    with pytest.raises(ValueError, match=r"--hparams: .*found\.json': unknown method 'lpz'"):
        tuned_file.load(path)


def found_by_itself(searched, names, settings):
    searched = json.loads(json.dumps(searched))
    tuned = tuned_file.Tuned("tuned", {"erm": {}}, file="found.json", searched=searched)
    assert not [line for line in tuned_file.notes(tuned, names, settings) if "searched" in line]
    return tuned_file.notes(tuned._replace(automatic=True), names, settings)


def test_methods_that_were_not_tuned_and_settings_that_were_not_searched_with_are_named():
    settings = Settings(imbalance=10.0, per_class=50, head="normalized", learning_rate=0.5)
    searched = Settings(evaluate_on="validation", augmentation="crop").as_dict()
    del searched["per_class"]  # files of earlier versions know nothing of it
    assert found_by_itself(searched, ["erm", "lpa", "erm+sam"], settings) == [
        "Not tuned, because found.json lacks them: lpa, erm+sam.",
        "found.json was searched with other settings: augmentation: crop there, none here; head: "
        "linear there, normalized here; imbalance: 100.0 there, 10.0 here; per_class: None there, "
        "50 here.",
    ]


@pytest.mark.parametrize("kind", [Settings, DomainSettings])
def test_nothing_is_said_of_a_search_with_the_settings_of_the_run(kind):
    assert (
        found_by_itself(kind().as_dict(), ["erm"], kind(data_dir="there", learning_rate=0.5)) == []
    )
    assert tuned_file.notes(tuned_file.DEFAULTS, ["erm"], kind()) == []


def test_the_tables_own_notes_name_them_and_so_does_a_line_before_training(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(tuned_file, "FOLDER", tmp_path)
    content = {"search": {"settings": {"epochs": 60}}, "methods": {"erm": {"chosen": {}}}}
    (tmp_path / "balanced_digits_mlp.json").write_text(json.dumps(content))
    message, out, err = run("balanced", "--dataset=digits", "--epochs=1", "--per_class=5",
                            "--methods=erm,focal", "--num_seeds=1",
                            f"--workdir={tmp_path / 'job'}")  # fmt: skip
    assert message is None
    table = (tmp_path / "job/table.md").read_text()
    for text in (
        "Not tuned, because balanced_digits_mlp.json lacks them: focal.",
        "balanced_digits_mlp.json was searched with other settings: ",
        "epochs: 60 there, 1 here; ",
    ):
        assert text in table and text in err.splitlines()[1]
        assert text.split()[0] in out
