"""Runs grouped by setting, and their numbers in one tidy frame."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from experiments.reporting.runs import Run, in_order, natural
from experiments.training.folder import DATA

COLUMNS = ["method", "seed", "domain", "selection", "measure", "value"]
# Results by method, one a seed (and test domain). Each has at least "seed" and "accuracy";
# "group_accuracy" where classes (many, medium, few) are told apart; "test_domain" and "selections"
# in domain generalization.
Results = Mapping[str, Sequence[Mapping[str, Any]]]


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
    def results(self) -> Results:
        """Results by method."""
        return {method: [run.result for run in runs] for method, runs in self.runs.items()}


def group(runs: Iterable[Run]) -> list[Setting]:
    """Runs by setting: everything in the configuration but method, seed, options, test domain.

    Runs of the first release do not say on which data they were trained. They belong to those that
    do, unless these differ in it.
    """
    runs = list(runs)
    known: dict[str, set[str]] = {}
    for run in runs:
        known.setdefault(_key(_setting_of(run)), set()).add(_key(_data_of(run)))
    by_setting: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        key = _key(_setting_of(run))
        data = _key(_data_of(run)) if len(known[key] - {_key({})}) > 1 else ""
        by_setting.setdefault((key, data), []).append(run)
    configs = [_setting_of(members[-1]) for members in by_setting.values()]
    configs = [config.get("settings") or config for config in configs]
    titles = [
        {**config, **_data_of(members[-1])}
        for config, members in zip(configs, by_setting.values(), strict=True)
    ]
    settings = [
        Setting(title, config, _by_method(members))
        for title, config, members in zip(
            _titles(titles), configs, by_setting.values(), strict=True
        )
    ]
    return sorted(settings, key=lambda setting: natural(setting.title))


def title_of(settings: Mapping[str, Any]) -> str:
    """What a reader has to know of the settings to understand a table.

    >>> title_of({"dataset": "digits", "profile": "step", "imbalance": 10.0, "model": "mlp"})
    'digits, step 10:1, mlp, test accuracy'
    """
    if "title" in settings:
        return settings["title"]
    parts = [str(settings.get("dataset", "unknown data"))]
    if settings.get("profile", "none") != "none":
        parts.append(f"{settings['profile']} {settings.get('imbalance', 1):g}:1")
    if settings.get("per_class"):
        parts.append(f"{settings['per_class']} training images a class")
    if settings.get("model"):
        parts.append(str(settings["model"]))
    return ", ".join([*parts, f"{settings.get('evaluate_on', 'test')} accuracy"])


def _setting_of(run: Run) -> dict[str, Any]:
    # Class sizes follow from the settings (and, with some splits, from the seed and the domain).
    apart = ("method", "seed", "options", "drawn_options", "test_domain", "train_counts", DATA)
    config = {key: value for key, value in run.config.items() if key not in apart}
    if config.get("settings"):
        config["settings"] = {k: v for k, v in config["settings"].items() if k not in apart}
    return config


def _data_of(run: Run) -> Mapping[str, Any]:
    """The digests of what a run was trained on, as far as its configuration holds them."""
    return run.config.get(DATA) or {}


def _key(value: Any) -> str:
    return repr(in_order(value))


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
        options = [run.config.get("options") or {} for run in members]
        names = sorted(set().union(*options))
        differing = [n for n in names if len({repr(o.get(n)) for o in options}) > 1]
        for run, own in zip(members, options, strict=True):
            label = method
            if len(places) < len(members):
                label += f" ({', '.join(f'{n}={own.get(n)}' for n in differing)})"
            named.setdefault(label, []).append(run)
    return dict(sorted(named.items()))


def tidy(results: Results) -> pd.DataFrame:
    """Every number of the runs in a row: method, seed, domain, selection, measure, value.

    Measures are accuracy, the groups and seconds; model selections have their accuracies.
    """
    rows = []
    for method, runs in results.items():
        for run in runs:
            place = (method, run["seed"], run.get("test_domain"))
            numbers = {"accuracy": run["accuracy"], **(run.get("group_accuracy") or {})}
            numbers["seconds"] = run.get("seconds")
            rows += [(*place, None, *item) for item in numbers.items()]
            made = (run.get("selections") or {}).items()
            rows += [(*place, selection, "accuracy", value) for selection, value in made]
    return pd.DataFrame(rows, columns=COLUMNS).dropna(subset="value")


def selections(frame: pd.DataFrame) -> list[str | None]:
    """Model selections that some run reports; None alone outside domain generalization."""
    return list(frame["selection"].dropna().unique()) or [None]


def values_of(
    frame: pd.DataFrame, selection: str | None = None, domains: Sequence[str] | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """What a table compares: one row a method, seed and measure.

    With test domains, the accuracy of a seed is the mean over them, and they are its groups; a
    seed that lacks one is left out. Without, a group counts that all runs of a method have.

    Args:
      frame: of `tidy`.
      selection: of the model; None takes each run's own accuracy.
      domains: test domains in the order of their columns; None for the order of the rows.

    Returns:
      The columns method, seed, measure and value; and a line for each run that is left out.
    """
    domains = list(frame["domain"].dropna().unique()) if domains is None else domains
    if not domains:
        sizes = frame.groupby(["method", "measure"])["seed"].transform("nunique")
        whole = frame[sizes == frame.groupby("method")["seed"].transform("nunique")]
        return whole[["method", "seed", "measure", "value"]], []
    rows, left_out = [], []
    for method, own in frame.groupby("method", sort=False):
        of = own["selection"].isna() if selection is None else own["selection"] == selection
        accuracies = own[of & (own["measure"] == "accuracy")]
        if accuracies.empty:
            left_out.append(f"{method}: its models were not selected so")
        for seed, found in accuracies.groupby("seed"):
            by_domain = dict(zip(found["domain"], found["value"], strict=True))
            missing = [domain for domain in domains if domain not in by_domain]
            if missing:
                left_out.append(f"{method} seed {seed}: no result for {', '.join(missing)}")
                continue
            seconds = own[(own["measure"] == "seconds") & (own["seed"] == seed)]["value"]
            numbers = {"accuracy": sum(by_domain[d] for d in domains) / len(domains)}
            numbers |= {domain: by_domain[domain] for domain in domains}
            numbers["seconds"] = seconds.mean() if len(seconds) == len(domains) else math.nan
            rows += [(method, seed, *item) for item in numbers.items()]
    return pd.DataFrame(rows, columns=["method", "seed", "measure", "value"]), left_out


def rows_frame(settings: Sequence[Setting]) -> pd.DataFrame:
    """One line a run, which `read_rows` reads."""
    return pd.DataFrame.from_records(
        [
            {
                "setting": setting.title,
                "folder": str(run.folder),
                "method": method,
                "seed": run.config["seed"],
                "test_domain": run.domain,
                "accuracy": run.result["accuracy"],
                **run.result.get("group_accuracy", {}),
                **run.result["selections"],
                "seconds": run.result.get("seconds", math.nan),
            }
            for setting in settings
            for method, runs in setting.runs.items()
            for run in runs
        ]
    )


def last_epoch_frame(settings: Sequence[Setting]) -> pd.DataFrame:
    """The last logged value of everything about training and about what perturbations do.

    One line for each run and measure, such as `train/accuracy` or
    `effect/hidden1/loss_change/positive`; measures that have no number are left out.
    """
    rows = [
        {
            "setting": setting.title,
            "method": method,
            "seed": run.config["seed"],
            "test_domain": run.domain,
            "measure": measure,
            "value": value,
        }
        for setting in settings
        for method, runs in setting.runs.items()
        for run in runs
        for measure, value in _last_values(run.result.get("curve") or ()).items()
    ]
    return pd.DataFrame.from_records(rows)


def _last_values(curve: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        name: value
        for record in curve
        for name, value in record.items()
        if name.startswith(("train/", "effect/")) and isinstance(value, (int, float))
    }


def slug(title: str) -> str:
    """A title as a file name.

    >>> slug("digits, step 10:1, mlp")
    'digits_step_10-1_mlp'
    """
    return re.sub(r"[^\w.+-]+", "_", title.replace(":", "-")).strip("_")
