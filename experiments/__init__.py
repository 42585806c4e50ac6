"""Experiment modules: each answers one question and runs as `python -m experiments.NAME`."""

import importlib.util
import os
import signal
import sys

# Ctrl-C ends a command that is still importing, not some import with an error of its own. Python
# sets this while it looks for the module of `-m`; `runtime.main.heed_ctrl_c` ends it.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# A standard stream that the caller closed would lend its number to a file that is opened next.
for _descriptor in range(3):
    try:
        os.fstat(_descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)
# Figures are files, whatever a notebook or a desktop has set; matplotlib checks it when imported.
os.environ["MPLBACKEND"] = "agg"

# What the extra `experiments` installs, as it is imported.
_PACKAGES = (
    "PIL", "absl", "array_record", "grain", "importlib_resources", "matplotlib", "mlxtend", "orbax",
    "pandas", "rich", "safetensors", "scipy", "sklearn", "tensorboardX", "tensorflow_datasets",
)  # fmt: skip

for _package in _PACKAGES:
    if importlib.util.find_spec(_package) is None:
        # With this name Python prints one line for `-m`, not its stack.
        raise ModuleNotFoundError(
            f"{_package} is missing: pip install -e '.[experiments]'", name=__name__
        )
