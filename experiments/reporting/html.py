"""A report as one page that needs nothing else: no network, figures inside, one small script."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting import sections as report_sections
from experiments.reporting import tables
from experiments.reporting.frame import Setting
from experiments.reporting.runs import Problem, Run
from experiments.reporting.sections import Section
from experiments.runtime import files

# More different values than this are counted instead of listed.
MOST_VALUES = 4

STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --paper: #fff; --line: #d5d5d5; --soft: #f3f4f6;
  --link: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e6; --paper: #16181c; --line: #3a3f47;
  --soft: #22262c; --link: #8ab8ee; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; color: var(--text);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
a { color: var(--link); }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
.wide > table { min-width: 100%; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; }
th { background: var(--soft); }
th:first-child, td:first-child { text-align: left; }
.numbers th:first-child, .numbers td:first-child { position: sticky; left: 0;
  background: var(--soft); min-width: min(42vw, 13rem); max-width: 42vw; white-space: normal; }
tr + tr td { border-top: 1px solid var(--line); }
.pairs th, .pairs td { text-align: left; white-space: normal; vertical-align: top; }
figure { margin: 1.25rem 0; }
figure .wide { background: #fff; }
img { display: block; margin: 0 auto; max-width: none; }
.answer { font-size: 1.1rem; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
figcaption, .notes { font-size: .875rem; }
details { margin: .75rem 0; } summary { cursor: pointer; }
"""

# Sorts a table by the number, or the text, at the start of a column's cells. The page's policy
# allows this script by its hash, and no other.
SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.onclick = () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => {
      const text = row.cells[head.cellIndex].textContent;
      const number = parseFloat(text.replace("[", ""));
      return isNaN(number) ? text : number;
    };
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = typeof x === "number" && typeof y === "number" ? x - y
        : String(x).localeCompare(String(y));
      return down ? -order : order;
    });
    body.append(...rows);
  };
}
"""


def page(sections: Sequence[Section], runs: Sequence[Run], problems: Sequence[Problem]) -> str:
    """The whole page.

    Args:
      sections: tables and their figures, which must still be where they were written.
      runs: that count.
      problems: folders that do not.
    """
    body = ["<h1>Report</h1>"]
    body.append(f"<p>Runs: {len(runs)}. Tables: {len(sections)}. Not counted: {len(problems)}.</p>")
    if len(sections) > 1:
        body.append("<ul>")
        for i, section in enumerate(sections):
            title, found = html.escape(section.title), html.escape(report_sections.answer(section))
            body.append(f'<li><a href="#t{i}">{title}</a>: {found}</li>')
        body.append("</ul>")
    for i, section in enumerate(sections):
        body += _section(section, f"t{i}")
    lines = "".join(f"<li>{html.escape(x)}</li>" for x in report_sections.how_to_read(sections))
    body += ["<h2>How to read the tables</h2>", f"<ul>{lines}</ul>"]
    body += ["<h2>Not counted</h2>", _problems(problems)]
    body.append(_details("Environment", "".join(_environments(runs))))
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{allowed}'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>Report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(section: Section, anchor: str) -> list[str]:
    parts = [f'<h2 id="{anchor}">{html.escape(section.title)}</h2>']
    parts.append(f'<p class="answer">{html.escape(report_sections.answer(section))}</p>')
    parts.append(f'<div class="wide">{_table(section.table, "numbers")}</div>')
    if section.notes:
        items = "".join(f"<li>{html.escape(note)}</li>" for note in section.notes)
        parts.append(f'<ul class="notes">{items}</ul>')
    if not section.contrasts.empty:
        contrast_table = _table(tables.contrast_table(section.contrasts), "numbers")
        parts += ["<h3>Contrasts</h3>", f'<div class="wide">{contrast_table}</div>']
    for caption, path in section.figures:
        image, text = base64.b64encode(path.read_bytes()).decode(), html.escape(caption)
        kind = {".svg": "svg+xml"}.get(path.suffix, path.suffix[1:])
        # At its own size, where text is read: a phone scrolls sideways.
        parts.append(
            f'<figure><div class="wide"><img alt="{html.escape(section.title)}: {text}" '
            f'src="data:image/{kind};base64,{image}"></div>'
            f"<figcaption>{text}</figcaption></figure>"
        )
    parts.append(_details("Seeds", _table(report_sections.seeds_table(section), "pairs")))
    parts.append(_details("Options of the methods", _table(_options(section.setting), "pairs")))
    parts.append(_details("Configuration", _table(_configuration(section.setting), "pairs")))
    return parts


def _table(lines: Sequence[Sequence[str]], kind: str) -> str:
    header, *body = [map(html.escape, x) for x in lines]
    if kind == "numbers":
        header = [f'<button type="button">{cell}</button>' for cell in header]
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in body)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _details(title: str, content: str) -> str:
    return f'<details><summary>{title}</summary><div class="wide">{content}</div></details>'


def _options(setting: Setting) -> list[list[str]]:
    """Options by method; those that were drawn anew for seeds or domains with all their values."""
    lines = [["method", "options"]]
    for method, runs in setting.runs.items():
        chosen = [run.config.get("options") or {} for run in runs]
        names = sorted(set().union(*chosen))
        texts = [f"{name}: {_values([o.get(name) for o in chosen])}" for name in names]
        lines.append([method, "; ".join(texts) or "none"])
    return lines


def _values(values: Sequence[Any]) -> str:
    texts = list(dict.fromkeys(_text(value) for value in values))
    return ", ".join(texts) if len(texts) <= MOST_VALUES else f"{len(texts)} different values"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _configuration(setting: Setting) -> list[list[str]]:
    config = sorted(setting.config.items())
    return [["setting", "value"], *([name, _text(value)] for name, value in config)]


def _problems(problems: Sequence[Problem]) -> str:
    items = [
        f"<li><code>{html.escape(str(problem.folder))}</code>: {html.escape(problem.reason)}</li>"
        for problem in problems
    ]
    return f'<ul class="notes">{"".join(items)}</ul>' if items else "<p>Nothing.</p>"


def _environments(runs: Sequence[Run]) -> list[str]:
    """Where the runs ran, as far as they say, and where this page was made."""
    recorded = {_text(run.result["environment"]): run.result["environment"]
                for run in runs if isinstance(run.result.get("environment"), dict)}  # fmt: skip
    parts = [_environment("Runs", found) for found in recorded.values()]
    return [*parts, _environment("This page", files.environment())]


def _environment(title: str, values: Mapping[str, Any]) -> str:
    lines = [["", title], *([name, _text(value)] for name, value in values.items())]
    return f'<div class="wide">{_table(lines, "pairs")}</div><p></p>'
