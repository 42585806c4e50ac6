"""The options that make the suite compile quickly leave out what the installed XLA lacks."""

import os

from tests.helpers import xla_options


def test_options_that_xla_has_are_set_and_one_that_it_lacks_is_left_out():
    options = {"xla_backend_optimization_level": "0", "xla_no_such_option": "1"}
    assert xla_options.known(options) == "--xla_backend_optimization_level=0"
    assert "--xla_backend_optimization_level=" in os.environ["XLA_FLAGS"]
