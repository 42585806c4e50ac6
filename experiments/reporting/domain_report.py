"""Tables of the domain generalization experiment: one for each model selection."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from experiments.reporting import summary, tables
from experiments.runtime import files

# By the names of `experiments.domains.selection`, as result files hold them.
TITLES = {
    "training_domain_validation": "model selection: training-domain validation",
    "leave_one_domain_out": "model selection: leave-one-domain-out",
    "oracle": "model selection: oracle (chooses on the test domain)",
}
LEGEND = (
    "Accuracy in per cent on the held-out domain's images that no validation uses, mean +- "
    "standard error over seeds; the average is over test domains within a seed. vs: paired "
    "difference of the averages. The oracle chooses with labelled images of the test domain: no "
    "other table does. seconds: mean wall time of the networks of a run, pairs apart."
)


def results_by_selection(
    results: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """For every selection that all runs have, what `summary` takes: by method, one entry a seed.

    The accuracy of a seed is the mean over test domains; these are its groups.
    """
    names = [
        name
        for name in TITLES
        if all(result["selections"].get(name) is not None for result in results)
    ]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in names}
    by_seed: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for result in results:
        by_seed.setdefault((result["method"], result["seed"]), []).append(result)
    for (method, seed), of_seed in by_seed.items():
        for name in names:
            accuracies = {run["test_domain"]: run["selections"][name] for run in of_seed}
            found[name].setdefault(method, []).append(
                {
                    "seed": seed,
                    "accuracy": sum(accuracies.values()) / len(accuracies),
                    "group_accuracy": accuracies,
                    "seconds": sum(run["seconds"] for run in of_seed) / len(of_seed),
                }
            )
    return found


def terminal_lines(numbers: summary.Summary) -> list[list[str]]:
    """Accuracy in each test domain and on average, and the average's difference to ERM."""
    lines = [["method", *numbers.groups, "average %", f"vs {numbers.baseline}", "seconds"]]
    for row in numbers.rows:
        lines.append(
            [
                row.method,
                *(row.groups[group].percent() for group in numbers.groups),
                row.accuracy.percent(),
                row.comparison.difference.percent(signed=True) if row.comparison else "",
                f"{row.seconds:.1f}",
            ]
        )
    return lines


def write(
    results: Sequence[Mapping[str, Any]],
    title: str,
    notes: Sequence[str],
    workdir: pathlib.Path,
) -> None:
    """Prints one table a selection and writes them."""
    summaries = {
        name: summary.summarize(table) for name, table in results_by_selection(results).items()
    }
    text = [f"## {title}\n"]
    for name, numbers in summaries.items():
        table = summary.markdown_table(summary.text_table(numbers))
        text.append(f"### {TITLES[name]}\n\n{table}")
    text += [f"{line}\n" for line in (LEGEND, *notes)]
    files.write_text(workdir / "table.md", "\n".join(text))
    frames = [summary.frame(numbers).assign(selection=name) for name, numbers in summaries.items()]
    frame = pd.concat(frames, ignore_index=True)
    frame.insert(0, "selection", frame.pop("selection"))
    files.write_text(workdir / "table.csv", summary.csv_text(frame))
    console = tables.console(width=160)
    console.print(title, style="bold")
    for name, numbers in summaries.items():
        console.print(tables.terminal_table(TITLES[name], terminal_lines(numbers)))
    for line in (LEGEND, *notes):
        console.print(line, highlight=False)
    console.print(f"Written to {workdir}{os.sep}", highlight=False)
