"""Finds the runs below any folders, and says of each folder that is not counted why it is not."""

import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.reporting.summary import Results, title_of
from experiments.runtime import files
from experiments.training.folder import CONFIG, RESULT

# Written by a job of a sweep when it ends.
OUTCOME = "outcome.json"
# Model selection that decides a domain-generalization run's one accuracy, if it names none itself.
SELECTION = "training_domain_validation"


class Run(NamedTuple):
    """A complete run.

    Attributes:
      folder: where it stands.
      config: its configuration.
      result: its result, with a finite "accuracy".
      domain: the domain left out for testing; None outside domain generalization.
    """

    folder: pathlib.Path
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    domain: str | None


class Problem(NamedTuple):
    """A folder that does not count, and why."""

    folder: pathlib.Path
    reason: str


class Setting(NamedTuple):
    """Runs that differ in nothing but method, seed, options and test domain.

    Attributes:
      title: what sets it apart, for readers.
      config: the settings.
      runs: by method.
    """

    title: str
    config: Mapping[str, Any]
    runs: Mapping[str, Sequence[Run]]

    @property
    def domains(self) -> tuple[str, ...]:
        """Test domains, in order; empty outside domain generalization."""
        found = {run.domain for runs in self.runs.values() for run in runs}
        return tuple(sorted(found - {None}, key=_natural))


def collect(roots: Iterable[pathlib.Path]) -> tuple[list[Run], list[Problem]]:
    """All complete runs below the folders, and the folders that do not count.

    Raises:
      ValueError: a folder does not exist.
    """
    folders = {}
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"{root} is not a folder")
        for name in (CONFIG, RESULT):
            # Folders may be given twice, or one inside the other.
            folders |= {path.parent.resolve(): path.parent for path in root.rglob(name)}
    runs, problems = [], []
    for folder in sorted(folders.values(), key=lambda folder: _natural(str(folder))):
        found = read_run(folder)
        (runs if isinstance(found, Run) else problems).append(found)
    problems += [problem for root in roots for problem in failed_jobs(root)]
    return _without_duplicates(runs, problems)


def failed_jobs(root: pathlib.Path) -> list[Problem]:
    """Jobs of a sweep that ended with an error."""
    outcomes = [(path.parent, files.read_json(path)) for path in sorted(root.rglob(OUTCOME))]
    return [
        Problem(folder, f"failed: {outcome.get('last_line')}")
        for folder, outcome in outcomes
        if isinstance(outcome, dict) and outcome.get("exit_status") != 0
    ]


def read_run(folder: pathlib.Path) -> Run | Problem:
    """The run in a folder that has a configuration or a result."""
    config, result = (files.read_json(folder / name) for name in (CONFIG, RESULT))
    for name, content in ((CONFIG, config), (RESULT, result)):
        if not (folder / name).exists():
            reason = "incomplete: interrupted or still running" if name == RESULT else "no run"
            return Problem(folder, f"{reason} ({name} is missing)")
        if not isinstance(content, dict):
            return Problem(folder, f"{name} is cut short or no JSON object")
    if not result.get("complete"):
        return Problem(folder, f"{RESULT} does not say that it is complete")
    if not isinstance(config.get("method"), str) or not isinstance(config.get("seed"), int):
        return Problem(folder, f"{CONFIG} names no method or no seed")
    for key in ("method", "seed"):
        if result.get(key, config[key]) != config[key]:
            return Problem(folder, f"{key} is {config[key]!r} in {CONFIG}, {result[key]!r} in "
                                   f"{RESULT}")  # fmt: skip
    # A selection that was not made is null.
    made = {k: v for k, v in result.get("selections", {}).items() if v is not None}
    result = {"accuracy": made.get(SELECTION), **result, "selections": made}
    for name, value in {**made, "accuracy": result["accuracy"]}.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            return Problem(folder, f"{RESULT} has no finite {name}")
    return Run(folder, config, result, _domain(config, result))


def _domain(config: Mapping[str, Any], result: Mapping[str, Any]) -> str | None:
    for place in (result, config, config.get("settings", {})):
        if place.get("test_domain") is not None:
            return str(place["test_domain"])
    return None


def _without_duplicates(
    runs: Sequence[Run], problems: list[Problem]
) -> tuple[list[Run], list[Problem]]:
    """The first of runs that repeat each other; counting a seed twice would shrink the error."""
    first: dict[str, Run] = {}
    for run in runs:
        key = repr((_sorted(run.config), run.domain))
        if key in first:
            problems.append(Problem(run.folder, f"repeats {first[key].folder}"))
        else:
            first[key] = run
    return list(first.values()), problems


def group(runs: Iterable[Run]) -> list[Setting]:
    """Runs by setting: everything in the configuration but method, seed, options, test domain."""
    by_setting: dict[str, list[Run]] = {}
    for run in runs:
        by_setting.setdefault(repr(_sorted(_setting_of(run))), []).append(run)
    configs = [_setting_of(members[0]) for members in by_setting.values()]
    titles = _titles([config.get("settings", config) for config in configs])
    settings = []
    for title, config, members in zip(titles, configs, by_setting.values(), strict=True):
        settings.append(Setting(title, config, _by_method(members)))
    return sorted(settings, key=lambda setting: _natural(setting.title))


def slug(title: str) -> str:
    """A title as a file name.

    >>> slug("digits, step 10:1, mlp")
    'digits_step_10-1_mlp'
    """
    return re.sub(r"[^\w.+-]+", "_", title.replace(":", "-")).strip("_")


def _setting_of(run: Run) -> dict[str, Any]:
    # Class sizes follow from the settings (and, with some splits, from the seed and the domain).
    apart = ("method", "seed", "options", "drawn_options", "test_domain", "train_counts")
    config = {key: value for key, value in run.config.items() if key not in apart}
    if isinstance(config.get("settings"), Mapping):
        config["settings"] = {k: v for k, v in config["settings"].items() if k not in apart}
    return config


def _titles(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """One title a setting; those that would read alike also name what they differ in."""
    titles = [title_of(config) for config in configs]
    full = []
    for title, config in zip(titles, configs, strict=True):
        alike = [c for t, c in zip(titles, configs, strict=True) if t == title]
        names = sorted(set().union(*alike))
        differing = [n for n in names if any(c.get(n) != config.get(n) for c in alike)]
        full.append(", ".join([title, *(f"{n} {config.get(n)}" for n in differing)]))
    return full


def _by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by method; a method that ran one seed with several options is several methods.

    Those are told apart by the options in which they differ: `lpa (lpa.radius=0.1)`.
    """
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(run.config["method"], []).append(run)
    named = {}
    for method, members in methods.items():
        places = {(run.config["seed"], run.domain) for run in members}
        options = [run.config.get("options", {}) for run in members]
        names = sorted(set().union(*options))
        differing = [n for n in names if len({repr(o.get(n)) for o in options}) > 1]
        for run, own in zip(members, options, strict=True):
            label = method
            if len(places) < len(members):
                label += f" ({', '.join(f'{n}={own.get(n)}' for n in differing)})"
            named.setdefault(label, []).append(run)
    return dict(sorted(named.items()))


def selections(setting: Setting) -> tuple[str, ...]:
    """Model selections that some run reports; empty outside domain generalization."""
    runs = [run for members in setting.runs.values() for run in members]
    return tuple(dict.fromkeys(name for run in runs for name in run.result["selections"]))


def results_of(setting: Setting) -> dict[str, list[Mapping[str, Any]]]:
    """Results by method, as `experiments.summary` takes them."""
    return {
        method: [{**run.result, "seed": run.config["seed"]} for run in runs]
        for method, runs in setting.runs.items()
    }


def domain_results(setting: Setting, selection: str | None) -> tuple[Results, list[str]]:
    """One result a seed, the mean over test domains; and what lacks a domain or the selection.

    Args:
      setting: with test domains.
      selection: of the model; None takes each run's own accuracy.
    """
    results, left_out = {}, []
    for method, runs in setting.runs.items():
        by_seed: dict[int, dict[str, Run]] = {}
        for run in runs:
            if selection is None or selection in run.result["selections"]:
                by_seed.setdefault(run.config["seed"], {})[run.domain] = run
        if not by_seed:
            left_out.append(f"{method}: its models were not selected so")
        for seed, found in sorted(by_seed.items()):
            missing = [domain for domain in setting.domains if domain not in found]
            if missing:
                left_out.append(f"{method} seed {seed}: no result for {', '.join(missing)}")
                continue
            accuracies = {d: _accuracy(found[d], selection) for d in setting.domains}
            seconds = [found[d].result.get("seconds", math.nan) for d in setting.domains]
            results.setdefault(method, []).append(
                {
                    "seed": seed,
                    "accuracy": sum(accuracies.values()) / len(accuracies),
                    "group_accuracy": accuracies,
                    "seconds": sum(seconds) / len(seconds),
                }
            )
    return results, left_out


def _accuracy(run: Run, selection: str | None) -> float:
    return run.result["accuracy"] if selection is None else run.result["selections"][selection]


def _sorted(value: Any) -> Any:
    """The same content in one order, so that equal configurations read alike."""
    if isinstance(value, Mapping):
        return [(key, _sorted(value[key])) for key in sorted(value)]
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts d2 before d15: digits by their value."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
