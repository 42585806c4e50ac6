"""Imports go one way, from the experiments down to the library."""

import ast
import functools
import graphlib
import re

from tests.helpers.paths import ROOT

# What the modules of each package may import besides their own package.
MAY = {
    "lpa_jax": "",
    "runtime": "lpa_jax",
    "methods": "lpa_jax runtime",
    "training": "lpa_jax runtime methods",
    "reporting": "lpa_jax runtime methods training",
    "images": "lpa_jax runtime methods training reporting",
    "domains": "lpa_jax runtime methods training reporting",
    "measuring": "lpa_jax runtime methods training reporting images domains",
    "compiled": "lpa_jax runtime methods",
    "jobs": "lpa_jax runtime methods training reporting",
}
PATHS = [path for name in ("lpa_jax", "experiments") for path in ROOT.glob(f"{name}/**/*.py")]
# "lpa_jax.data.batching" -> its file; a package goes by its own name.
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PATHS
}


def imported(path):
    """The modules of the repository that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in full]
        else:
            continue
        yield from (name for name in names if name in MODULES)


@functools.cache
def imports():
    """(importing module, imported module), all of them."""
    return {(name, to) for name, path in MODULES.items() for to in imported(path)}


def package(module):
    """The package of a module: a key of MAY, or "questions" for modules that users run."""
    parts = module.split(".")
    if parts[0] == "lpa_jax":
        return "lpa_jax"
    inner = parts[1] if len(parts) > 1 else ""
    return inner if inner in MAY else "questions"


def is_backward(start, end):
    start, end = package(start), package(end)
    return start not in ("questions", end) and end not in MAY[start].split()


def test_imports_go_one_way():
    assert not {pair for pair in imports() if is_backward(*pair)}


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: {end for start, end in imports() if start == name} for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_library_knows_no_flags():
    for path in (ROOT / "lpa_jax").rglob("*.py"):
        assert not re.search(r"(from|import) absl", path.read_text(encoding="utf-8")), path
