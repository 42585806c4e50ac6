"""Reads runs from result folders, or from the rows of a runs.csv.

Folders and files are untrusted: what has missing or wrong fields is listed with the reason and
does not count.
"""

import csv
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.runtime import schema
from experiments.runtime.schema import ANY, TEXT, WHOLE
from experiments.training.folder import (
    CONFIG,
    CONFIG_SCHEMA,
    LOGS,
    OUTCOME,
    RESULT,
    RESULT_SCHEMA,
    disagreement,
    log_digests,
)

OUTCOME_SCHEMA = {"exit_status": WHOLE, "results?": [TEXT], "last_line?": ANY, ...: ANY}
# One line a run, as `report` writes it.
ROWS = "runs.csv"
# Model selections of domain generalization. The first decides a run's one accuracy, if the run
# names none itself.
SELECTIONS = ("training_domain_validation", "leave_one_domain_out", "oracle")


class Run(NamedTuple):
    """A complete run.

    Attributes:
      folder: where it was found.
      config: its configuration; of a row, only what the row says.
      result: its result, with "seed", a finite "accuracy" and "selections".
      domain: the domain left out for testing; None outside domain generalization.
    """

    folder: pathlib.Path
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    domain: str | None


class Problem(NamedTuple):
    """A folder or row that does not count, and why."""

    folder: pathlib.Path
    reason: str


def collect(roots: Iterable[pathlib.Path]) -> tuple[list[Run], list[Problem]]:
    """All complete runs below the folders, and what does not count.

    Args:
      roots: folders with run folders anywhere below, or, if there are none, with a runs.csv; or
        files with such rows.

    Raises:
      ValueError: a root is neither a folder nor a file.
    """
    folders, rows = {}, {}
    for root in roots:
        if not root.exists():
            raise ValueError(f"{root} is not a folder or a file of rows")
        # Folders may be given twice, or one inside the other.
        found = {p.parent.resolve(): p.parent for n in (CONFIG, RESULT) for p in root.rglob(n)}
        folders |= found
        table = root / ROWS if root.is_dir() else root
        if not found and table.is_file():
            rows[table.resolve()] = table
    found = [read_run(folder) for folder in sorted(folders.values(), key=lambda f: natural(str(f)))]
    for path in rows.values():
        found += read_rows(path)
    known = {problem.folder for problem in found if isinstance(problem, Problem)}
    found += [p for root in roots for p in failed_jobs(root) if p.folder not in known]
    return _without_duplicates(found)


def failed_jobs(root: pathlib.Path) -> list[Problem]:
    """Jobs of a sweep that ended with an error, and runs that failed."""
    found = []
    for path in sorted(root.rglob(OUTCOME)):
        try:
            outcome = schema.read(path, OUTCOME_SCHEMA)
        except ValueError as error:
            found.append(Problem(path.parent, str(error)))
            continue
        if outcome is not None and outcome["exit_status"] != 0:
            found.append(Problem(path.parent, f"failed: {outcome.get('last_line')}"))
    return found


def damaged_logs(roots: Iterable[pathlib.Path]) -> list[str]:
    """A line for each log of a finished run that has changed since the run wrote it."""
    lines = []
    for path in {path.resolve(): path for root in roots for path in root.rglob(LOGS)}.values():
        try:
            written = schema.read(path, {...: TEXT}) or {}
        except ValueError as error:
            lines.append(str(error))
            continue
        for name, digest in log_digests(path.parent).items():
            if written.get(name, digest) != digest:
                lines.append(f"{path.parent / name} has changed since the run wrote it")
    return lines


def read_run(folder: pathlib.Path) -> Run | Problem:
    """The run in a folder that has a configuration or a result."""
    try:
        config = schema.read(folder / CONFIG, CONFIG_SCHEMA)
        result = schema.read(folder / RESULT, RESULT_SCHEMA)
    except ValueError as error:
        return Problem(folder, str(error).removeprefix(f"{folder}/"))
    for name, content in ((CONFIG, config), (RESULT, result)):
        if name == RESULT and content is None and failed_jobs(folder):
            return failed_jobs(folder)[0]
        if content is None:
            reason = "incomplete: interrupted or still running" if name == RESULT else "no run"
            return Problem(folder, f"{reason} ({name} is missing)")
    if not result.get("complete"):
        return Problem(folder, f"{RESULT} does not say that it is complete")
    disagreeing = disagreement(config, result)
    if disagreeing is not None:
        return Problem(folder, disagreeing)
    # A selection that was not made is null.
    made = {k: v for k, v in (result.get("selections") or {}).items() if v is not None}
    result = {k: v for k, v in result.items() if v is not None}
    result = {"accuracy": made.get(SELECTIONS[0])} | result | {"selections": made}
    if result["accuracy"] is None:
        return Problem(folder, f"{RESULT} has no accuracy")
    places = (result, config, config.get("settings") or {})
    domain = next((p["test_domain"] for p in places if p.get("test_domain") is not None), None)
    return Run(folder, config, {**result, "seed": config["seed"], "test_domain": domain}, domain)


def read_rows(path: pathlib.Path) -> list[Run | Problem]:
    """The runs of a runs.csv, a run or a problem for each line.

    Columns: method, seed, accuracy; if known setting (its title), folder, test_domain, seconds and
    model selections. Any other column is the accuracy of a group. In a file without the column
    setting, every folder above runs/METHOD is a setting.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *lines = list(csv.reader(file, strict=True)) or [[]]
    except (ValueError, csv.Error) as error:
        return [Problem(path, f"is no CSV: {error}")]
    for name in ("method", "seed", "accuracy", *header):
        if header.count(name) != 1:
            return [Problem(path, f"must have one column {name!r}, got {header.count(name)}")]
    found: list[Run | Problem] = []
    for number, line in enumerate(lines, 2):
        try:
            found.append(_row(path, header, line))
        except ValueError as error:
            found.append(Problem(path, f"line {number}: {error}"))
    return found


def _row(path: pathlib.Path, header: Sequence[str], line: Sequence[str]) -> Run:
    if len(line) != len(header):
        raise ValueError(f"must have {len(header)} cells, got {len(line)}")
    cells = dict(zip(header, line, strict=True))
    setting, folder, method, domain = (
        cells.pop(name, "") for name in ("setting", "folder", "method", "test_domain")
    )
    if not method or not all(map(str.isprintable, (setting, folder, method, domain, *header))):
        raise ValueError("names must be printable, and the method not empty")
    seed = _number(int, "seed", cells.pop("seed"))
    numbers = {name: _number(float, name, text) for name, text in cells.items() if text}
    for name, value in numbers.items():
        most = math.inf if name == "seconds" else 1.0
        if not 0 <= value <= most or math.isinf(value):
            raise ValueError(f"{name} must be between 0 and {most:g}, got {value:g}")
    result = {
        "seed": seed,
        "accuracy": numbers.pop("accuracy", None),
        "seconds": numbers.pop("seconds", math.nan),
        "test_domain": domain or None,
        "selections": {name: value for name, value in numbers.items() if name in SELECTIONS},
        "group_accuracy": {k: value for k, value in numbers.items() if k not in SELECTIONS},
    }
    if result["accuracy"] is None:
        raise ValueError("accuracy must be a number, got none")
    above = re.sub(r"(/?runs)?/[^/]+(/test_[^/]*)?/seed_\d+(/.*)?$", "", folder)
    config = {"method": method, "seed": seed, "title": setting or above or path.parent.name}
    return Run(pathlib.Path(folder), config, result, domain or None)


def _number(kind: type, name: str, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {what}, got {text[:40]!r}") from None


def _without_duplicates(found: Sequence[Run | Problem]) -> tuple[list[Run], list[Problem]]:
    """The first of runs that repeat each other; counting a seed twice would shrink the error."""
    first: dict[str, Run] = {}
    problems = [problem for problem in found if isinstance(problem, Problem)]
    for run in (run for run in found if isinstance(run, Run)):
        key = repr((in_order(run.config), run.domain))
        if key in first:
            problems.append(Problem(run.folder, f"repeats {first[key].folder}"))
        else:
            first[key] = run
    return list(first.values()), problems


def in_order(value: Any) -> Any:
    """The same content in one order, so that equal configurations read alike."""
    if isinstance(value, Mapping):
        return [(key, in_order(value[key])) for key in sorted(value)]
    return [in_order(item) for item in value] if isinstance(value, list) else value


def natural(text: str) -> list[tuple[int, str]]:
    """Sorts d2 before d15: digits by their value."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
