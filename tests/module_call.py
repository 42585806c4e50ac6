"""Runs an experiment's module in this process as its command line would."""

import contextlib
import io

from absl import flags

FLAGS = flags.FLAGS


def call(module, *arguments):
    """(exit message or None, standard output) of a module; its flags are forgotten afterwards."""
    message, out = None, io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            module.define_flags()
            module.main(FLAGS([module.__name__, *arguments])[:1])
    except (SystemExit, flags.Error) as stop:
        message = str(stop)
    finally:
        for name in list(FLAGS):
            if FLAGS.find_module_defining_flag(name).startswith("experiments."):
                delattr(FLAGS, name)
        FLAGS.unparse_flags()
    return message, out.getvalue()
