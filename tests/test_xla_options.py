"""The options that make the suite compile quickly: all known here, and what is not known is left out."""

import xla_options


def test_the_installed_xla_knows_every_option_and_one_that_it_lacks_is_left_out():
    assert xla_options.known() == " ".join(f"--{n}={v}" for n, v in xla_options.QUICK.items())
    assert xla_options.known({"xla_no_such_option": "1"}) == ""
