"""Two processes, one of them lost in every way: the other ends in time and says so in one line.

    python -m pytest -n 0 -m stress -v tests/stress/test_multihost_faults.py

STRESS_ROUNDS (5) is how often each case is tried: 20 processes killed or stopped in a row, and 20
that fail or never come.
"""

import collections
import os
import signal

import pytest

from tests.helpers import hosts

pytestmark = [
    pytest.mark.stress,
    pytest.mark.parametrize("round_number", range(int(os.environ.get("STRESS_ROUNDS", "5")))),
]


SURVIVED = collections.Counter()


@pytest.fixture
def survived(report):
    """(fault): counts one more, and prints how many of it ended the other process as they must."""

    def count(fault):
        SURVIVED[fault] += 1
        report(f"{fault}: {SURVIVED[fault]} ended in time, non-zero, in one line")

    return count


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_process_ends_the_other(number, fault, round_number, survived):
    hosts.check_fault(number, fault)
    survived(fault.name)


@pytest.mark.parametrize("number", [0, 1])
def test_exception_in_one_process_ends_both(number, round_number, survived):
    hosts.check_fault(number, None, fail_at=20)
    survived("exception")


@pytest.mark.parametrize("number", [0, 1])
def test_peer_that_never_comes_is_not_waited_for_longer_than_asked(number, round_number, survived):
    hosts.check_absent_peer(number)
    survived("never came")
