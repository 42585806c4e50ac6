"""Hyperparameters found by tuning: the file that holds them, and notes for the table."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from experiments.methods import names
from experiments.methods.data_set_defaults import set_name
from experiments.runtime import fields, files, schema
from experiments.runtime.schema import ANY, OBJECT
from lpa_jax.checkpoints.checkpoints import differences

FOLDER = pathlib.Path(__file__).parent / "hparams"
# Settings that may differ between a search and a run: those that a search draws or fixes, and
# those about data folders and the frequency of evaluations.
_MAY_DIFFER = (
    "learning_rate",
    "weight_decay",
    "evaluate_on",
    "validation_fraction",
    "split_seed",
    "deal_seed",
    "data_dir",
    "image_root",
    "train_list",
    "eval_list",
    "evaluate_every",
    "accumulate",
)
_SCHEMA = {
    "methods": {
        ...: {"chosen": OBJECT, "by_test_domain?": {...: {"options": OBJECT, ...: ANY}}, ...: ANY}
    },
    "search?": {"settings?": OBJECT, ...: ANY},
    ...: ANY,
}
_NONE: Mapping[str, Any] = MappingProxyType({})


class Tuned(NamedTuple):
    """Hyperparameters found by tuning.

    Attributes:
      origin: where they come from.
      pooled: by method; in domain generalization the best on average over the test domains that
        were tuned with.
      by_domain: by method and test domain, from networks that never saw that domain.
      file: name of the file, or None.
      searched: settings that were searched under, where the file says so.
      automatic: whether --hparams=auto found the file.
    """

    origin: str
    pooled: Mapping[str, Mapping[str, Any]] = _NONE
    by_domain: Mapping[str, Mapping[str, Mapping[str, Any]]] = _NONE
    file: str | None = None
    searched: Mapping[str, Any] = _NONE
    automatic: bool = False

    def options(self, method: str, test: str) -> Mapping[str, Any]:
        """Hyperparameters of a method for a test domain."""
        return self.by_domain.get(method, {}).get(test, self.pooled.get(method, {}))


DEFAULTS = Tuned("the methods' defaults")


def find(
    hparams: str, experiment: str, settings: Any, run_options: Sequence[str] = names.RUN_OPTIONS
) -> Tuned:
    """The hyperparameters that --hparams names.

    Args:
      hparams: its value: a file, auto for the project's own of this data set and model, or none.
      experiment: the experiment that the project's own file was tuned for.
      settings: of the run.
      run_options: as `load`.

    Raises:
      ValueError: as `load`.
    """
    if hparams == "none":
        return DEFAULTS
    if hparams != "auto":
        return load(hparams, run_options)
    path = FOLDER / f"{experiment}_{set_name(settings.dataset)}_{settings.model}.json"
    if not path.exists():
        return Tuned(f"{DEFAULTS.origin} (nothing tuned for {path.stem})")
    return load(path, run_options)._replace(automatic=True)


def notes(tuned: Tuned, methods: Sequence[str], settings: Any) -> list[str]:
    """Notes for the table about methods that were not tuned, or not for this run.

    Args:
      tuned: from `find`.
      methods: names of the methods in the table.
      settings: of the run, a dataclass with `as_dict`.
    """
    if tuned.file is None:
        return []
    lines = []
    untuned = [name for name in methods if name not in tuned.pooled]
    if untuned:
        lines.append(f"Not tuned, because {tuned.file} lacks them: {', '.join(untuned)}.")
    if tuned.automatic and tuned.searched:
        ran = files.plain(settings.as_dict())
        defaults = {
            field.name: files.plain(field.default)
            for field in dataclasses.fields(settings)
            if field.name not in _MAY_DIFFER
        }
        # Settings at their defaults need not be written.
        there, here = (
            {n: of.get(n, defaults[n]) for n in defaults} for of in (tuned.searched, ran)
        )
        differing = differences(there, here)
        if differing:
            lines.append(f"{tuned.file} was searched with other settings: {'; '.join(differing)}.")
    return lines


def load(path: str | pathlib.Path, run_options: Sequence[str] = names.RUN_OPTIONS) -> Tuned:
    """Hyperparameters from a file that `experiments.tune` or `domain_tune` wrote.

    Args:
      path: of the file.
      run_options: options of the run that it may hold.

    Raises:
      ValueError: the file is missing, is not such a file, or holds an option that its method does
        not have or a value that the option does not take.
    """
    path = pathlib.Path(path)
    content = fields.named("hparams", lambda: schema.read(path, _SCHEMA))
    if content is None:
        raise ValueError(f"--hparams: cannot read {str(path)!r} (there is no such file)")
    entries, searched = content["methods"], content.get("search", {}).get("settings", {})
    pooled = {method: entry["chosen"] for method, entry in entries.items()}
    by_domain = {
        method: {
            domain: found["options"] for domain, found in entry.get("by_test_domain", {}).items()
        }
        for method, entry in entries.items()
    }
    for method in pooled:
        for options in (pooled[method], *by_domain[method].values()):
            try:
                _check(method, options, run_options)
            except ValueError as error:
                what = str(error).removeprefix("--methods: ")
                raise ValueError(f"--hparams: {str(path)!r}: {what}") from None
    return Tuned(f"tuned on validation, {path.name}", pooled, by_domain, path.name, searched)


def _check(method: str, options: Mapping[str, Any], run_options: Sequence[str]) -> None:
    parts = [part.name for part in names.parse(method)]
    known = [f"{part}.{option}" for part in parts for option in names.part_options(part)]
    for key, value in options.items():
        if key not in (*known, *run_options):
            raise ValueError(f"{method} has no option {key!r}")
        try:
            names.check_value(key, value)
        except ValueError as error:
            raise ValueError(f"{method}: {error}") from None
