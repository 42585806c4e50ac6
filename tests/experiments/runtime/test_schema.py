"""JSON files of ours are checked where they are read."""

import json

import pytest

from experiments.reporting import frame, runs
from experiments.runtime import schema
from experiments.training.folder import LOGS, log_digests
from tests.helpers import made_up_runs

WRONG = [None, True, -1, 1.5, 10**400, "x", "\ud800", [], ["x"], {}, {"x": "y"}, [[[0]]]]


def fields(value, place=()):
    """Places of all values within a value, itself included."""
    yield place
    for key, item in (
        *(value.items() if isinstance(value, dict) else ()),
        *(enumerate(value) if isinstance(value, list) else ()),
    ):
        yield from fields(item, (*place, key))


def replaced(value, place, new):
    if not place:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = replaced(value[place[0]], place[1:], new)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_field_of_any_other_type_is_no_traceback_in_a_report(tmp_path, name):
    folder = made_up_runs.write(
        tmp_path / "run",
        "lpa",
        0,
        0.5,
        options={"lpa.radius": 0.1},
        curve=[{"epoch": 1, "evaluation/accuracy": 0.5, "classes/a/b": [0.1, None]}],
        group_accuracy={"many": 0.7},
        selections={"oracle": 0.5},
    )
    content = json.loads((folder / name).read_text())
    for place in fields(content):
        for wrong in WRONG:
            (folder / name).write_text(json.dumps(replaced(content, place, wrong)))
            found, problems = runs.collect([tmp_path])
            for setting in frame.group(found):
                frame.tidy(setting.results)
                frame.rows_frame([setting]).to_csv().encode()
            assert len(found) + len(problems) == 1
    deep = json.dumps(content)[:-1] + ', "deep": ' + "[" * 200 + "]" * 200 + "}"
    (folder / name).write_text(deep)
    assert "must not be nested so deeply" in runs.collect([tmp_path])[1][0].reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1e999}', "a must be a finite number"),
        ('{"a": NaN}', "a must be a finite number"),
        ('{"b": 1}', "a must be a finite number, got nothing"),
        ('{"a": 1, "c": 1}', "c must be a known field"),
        ('{"a": 1', "is cut short or not JSON"),
        ("[" * 10**5, "is cut short or not JSON"),
    ],
)
def test_file_and_field_are_named(tmp_path, text, reason):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json:? {reason}"):
        schema.read(path, {"a": schema.NUMBER})
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert schema.read(path, {"a": schema.NUMBER, "b?": schema.TEXT}) == {"a": 1}


def test_logs_that_changed_after_the_run_are_named(tmp_path):
    log = tmp_path / "run" / "metrics.jsonl"
    log.parent.mkdir()
    log.write_text('{"epoch": 1}\n')
    (log.parent / LOGS).write_text(json.dumps(log_digests(log.parent)))
    assert runs.damaged_logs([tmp_path]) == []
    log.write_text('{"epoch": 2}\n')
    assert runs.damaged_logs([tmp_path]) == [f"{log} has changed since the run wrote it"]
