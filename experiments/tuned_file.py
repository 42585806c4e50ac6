"""Hyperparameters found by tuning: the file that holds them, found, read and checked."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from experiments import methods

FOLDER = pathlib.Path(__file__).parent / "hparams"
_NONE: Mapping[str, Any] = MappingProxyType({})


class Tuned(NamedTuple):
    """Hyperparameters found by tuning.

    Attributes:
      origin: where they come from.
      pooled: by method; in domain generalization the best on average over the test domains that
        were tuned with.
      by_domain: by method and test domain, from networks that never saw that domain.
    """

    origin: str
    pooled: Mapping[str, Mapping[str, Any]] = _NONE
    by_domain: Mapping[str, Mapping[str, Mapping[str, Any]]] = _NONE

    def options(self, method: str, test: str) -> Mapping[str, Any]:
        """Those of a method for a test domain."""
        return self.by_domain.get(method, {}).get(test, self.pooled.get(method, {}))


DEFAULTS = Tuned("the methods' defaults")


def find(
    hparams: str,
    experiment: str,
    settings: Any,
    run_options: Sequence[str] = methods.RUN_OPTIONS,
) -> Tuned:
    """What a flag --hparams means.

    Args:
      hparams: its value: a file, auto for the project's own of this data set and model, or none.
      experiment: which the project's own file was tuned for.
      settings: of the run.
      run_options: as `load`.

    Raises:
      ValueError: as `load`.
    """
    if hparams == "none":
        return DEFAULTS
    if hparams != "auto":
        return load(hparams, run_options)
    path = FOLDER / f"{experiment}_{settings.dataset}_{settings.model}.json"
    if not path.exists():
        return Tuned(f"{DEFAULTS.origin} (nothing tuned for {path.stem})")
    return load(path, run_options)


def load(path: str | pathlib.Path, run_options: Sequence[str] = methods.RUN_OPTIONS) -> Tuned:
    """Hyperparameters from a file that `experiments.tune` or `domain_tune` wrote.

    Args:
      path: of the file.
      run_options: what it may hold besides the options of parts.

    Raises:
      ValueError: the file is missing, is not such a file, or holds an option that its method does
        not have or a value that the option does not take.
    """
    path = pathlib.Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["methods"]
        pooled = {method: dict(entry["chosen"]) for method, entry in entries.items()}
        by_domain = {
            method: {
                domain: dict(found["options"])
                for domain, found in entry.get("by_test_domain", {}).items()
            }
            for method, entry in entries.items()
        }
    except OSError as error:
        raise ValueError(f"--hparams: cannot read {str(path)!r} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"--hparams: {str(path)!r} is not a file written by experiments.tune"
        ) from None
    for method in pooled:
        for options in (pooled[method], *by_domain[method].values()):
            try:
                _check(method, options, run_options)
            except ValueError as error:
                what = str(error).removeprefix("--methods: ")
                raise ValueError(f"--hparams: {str(path)!r}: {what}") from None
    return Tuned(f"tuned on validation, {path.name}", pooled, by_domain)


def _check(method: str, options: Mapping[str, Any], run_options: Sequence[str]) -> None:
    parts = [part.name for part in methods.parse(method)]
    known = [f"{part}.{option}" for part in parts for option in methods.part_options(part)]
    for key, value in options.items():
        if key not in (*known, *run_options):
            raise ValueError(f"{method} has no option {key!r}")
        try:
            methods.check_value(key, value)
        except ValueError as error:
            raise ValueError(f"{method}: {error}") from None
