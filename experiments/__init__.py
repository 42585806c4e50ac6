"""Experiment modules: each answers one question and runs as `python -m experiments.NAME`."""

import importlib.util

# What the extra `experiments` installs, as it is imported.
_PACKAGES = (
    "PIL",
    "absl",
    "array_record",
    "grain",
    "importlib_resources",
    "matplotlib",
    "mlxtend",
    "orbax",
    "pandas",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorboardX",
    "tensorflow_datasets",
)

for _package in _PACKAGES:
    if importlib.util.find_spec(_package) is None:
        # With this name Python prints one line for `-m`, not its stack.
        raise ModuleNotFoundError(
            f"{_package} is missing: pip install -e '.[experiments]'", name=__name__
        )
