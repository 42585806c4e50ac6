"""What the full counts share."""

import pytest


@pytest.fixture
def report(capsys):
    """Prints a line of the summary at once."""

    def print_line(line):
        with capsys.disabled():
            print(f"\n{line}", end="", flush=True)

    return print_line
