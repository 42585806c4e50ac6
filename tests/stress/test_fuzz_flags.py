"""Bad values of every flag of every experiment: one line, soon, before anything is written.

    python -m pytest -n 0 -m stress tests/stress/test_fuzz_flags.py

tries the cases of `tests.helpers.flag_fuzz`, all values of a flag that its own code reads and four
of those that a parser refuses for all flags of a kind, and prints the counts of each experiment.
STRESS_EVERY=1 tries every value on every flag.
"""

import collections
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.helpers.flag_fuzz import EXPERIMENTS, HUNG

pytestmark = pytest.mark.stress
ROOT = pathlib.Path(__file__).parents[2]
WHICH = "every" if os.environ.get("STRESS_EVERY") else "some"


def ends(experiment, folder):
    """Each case with its end, over as many processes as hang."""
    first = 0
    while True:
        command = [sys.executable, "-m", "tests.helpers.flag_fuzz", experiment, folder]
        found = subprocess.run(
            [*map(str, command), str(first), WHICH],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        case = None
        for line in found.stdout.splitlines():
            record = json.loads(line)
            if "case" in record:
                case = record
            else:
                yield case, record
        if found.returncode == 0:
            return
        assert -found.returncode in HUNG, found.stderr[-2000:]
        yield case, {"end": "hung", "said": "", "wrote": []}
        first = case["case"] + 1


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_bad_values_are_refused_in_one_line_before_anything_is_written(
    experiment, tmp_path, report
):
    counts, failures = collections.Counter(), []
    for case, record in ends(experiment, tmp_path):
        counts[record["end"]] += 1
        wrote_first = record["end"] == "refused" and record["wrote"]
        if record["end"] not in ("refused", "accepted") or wrote_first:
            failures.append({**case, **record})
    report(f"{experiment}: {dict(counts)} of {counts.total()}")
    assert not failures, json.dumps(failures, indent=1)
    # compile_check may lack libtpu.
    assert counts["accepted"] or experiment == "compile_check"
