"""Runs the code of a notebook and collects what its cells show.

    python -m tests.helpers.notebook docs/examples/tour.ipynb

writes the outputs, figures as SVG, into the notebook.
"""

import ast
import contextlib
import io
import json
import pathlib
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt

# The same figure gives the same text; letters are letters, which keeps it small.
SVG = {"svg.hashsalt": "notebook", "svg.fonttype": "none"}


def run(path: pathlib.Path) -> tuple[dict, dict]:
    """The notebook with fresh outputs, and the variables that its cells leave."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    namespace = {"__name__": path.stem}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        cell["execution_count"] = number
        cell["outputs"] = _outputs("".join(cell["source"]), namespace, number)
    return notebook, namespace


def _outputs(source: str, namespace: dict, number: int) -> list[dict]:
    plt.close("all")
    printed, outputs = io.StringIO(), []
    *body, last = ast.parse(source).body
    shown = isinstance(last, ast.Expr) and not source.rstrip().endswith(";")
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body + [last] * (not shown), []), "cell", "exec"), namespace)
        value = (
            eval(compile(ast.Expression(last.value), "cell", "eval"), namespace) if shown else None
        )
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        data = {"text/plain": [repr(value)]}
        outputs.append({"data": data, "execution_count": number, "metadata": {},
                        "output_type": "execute_result"})  # fmt: skip
    for figure in map(plt.figure, plt.get_fignums()):
        content = io.StringIO()
        with mpl.rc_context(SVG):
            figure.savefig(content, format="svg", bbox_inches="tight", metadata={"Date": None})
        data = {"image/svg+xml": content.getvalue().splitlines(keepends=True)}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    return outputs


if __name__ == "__main__":
    mpl.use("agg")
    place = pathlib.Path(sys.argv[1])
    sys.path.insert(0, str(place.parent))
    text = json.dumps(run(place)[0], indent=1, ensure_ascii=False)
    place.write_text(text + "\n", encoding="utf-8")
