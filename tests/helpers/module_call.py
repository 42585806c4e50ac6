"""Runs an experiment's module in this process as its command line would."""

import contextlib
import importlib
import io

from absl import flags

FLAGS = flags.FLAGS


def own_flags():
    return [
        name for name in FLAGS if FLAGS.find_module_defining_flag(name).startswith("experiments.")
    ]


def forget_flags():
    """Makes room for the next module: in a process of its own, each would define its flags once."""
    for name in own_flags():
        delattr(FLAGS, name)
    FLAGS.unparse_flags()


def run_main(module, *arguments):
    """The exit message of a module, None if it ends well; its flags are forgotten afterwards."""
    try:
        module.define_flags()
        module.main(FLAGS([module.__name__, *arguments]))
    except (SystemExit, flags.Error) as stop:
        return str(stop)
    finally:
        forget_flags()
    return None


def call(module, *arguments):
    """(exit message or None, standard output) of a module."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        message = run_main(module, *arguments)
    return message, out.getvalue()


def printed_rows(text):
    """The cells of the tables that a module printed, headers first, line by line."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def call_by_name(data_dir, name, *arguments):
    """Runs a module as its command line would; the exit message, None if it ends well."""
    module = importlib.import_module(f"experiments.{name}")
    return run_main(module, f"--data_dir={data_dir}", "--compilation_cache=", *arguments)
