"""Compiled programs kept in a file that can be committed, and what tells whether they still hold.

A program is kept with a fingerprint of its lowered text, which is all that the compiler gets, and
of the Python sources that it was traced from. While the sources are the same, nothing is traced.
Where they differ, it is traced and lowered again, which takes seconds; it is compiled again, which
takes minutes, only if the lowered text is another one.
"""

import ast
import functools
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Iterator

import lpa_jax
from experiments.compiled import promises, step_cost, tpu
from experiments.methods import build as assembly
from experiments.runtime import files

# Changed by hand when `tpu.Lowered.compile` or `experiments.hlo` reads something else from a
# compiled program than before: programs kept under another number are compiled again.
READING = 1
PACKAGES = ("jax", "jaxlib", "libtpu")


class Programs:
    """Programs by name, compiled when they are asked for and not there.

    Args:
      path: the file, or None to keep nothing.
      compile_missing: if not, `get` gives what is in the file, which `holds` says the truth about
        afterwards.

    Raises:
      ValueError: the file is not one of this class, or of other versions of jax and libtpu.
    """

    def __init__(self, path: str | None, compile_missing: bool = True):
        self._path = path
        self._compile_missing = compile_missing
        self._versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        self._programs: dict[str, dict] = {}
        if path is None or not pathlib.Path(path).exists():
            return
        kept = files.read_json(path)
        if not isinstance(kept, dict) or not {"versions", "programs"} <= set(kept):
            raise ValueError(f"--output: {path!r} is not a file of this program")
        if kept["versions"] != self._versions:
            raise ValueError(
                f"--output: {path!r} holds programs of {kept['versions']}, this is {self._versions}"
            )
        self._programs = kept["programs"]

    def __contains__(self, key: str) -> bool:
        return key in self._programs

    def holds(self, key: str) -> bool:
        """Whether the program called `key` is kept and known to be that of today's sources."""
        kept = self._programs.get(key)
        return kept is not None and (kept["reading"], kept["sources"]) == (READING, sources())

    def get(self, key: str, lower: Callable[[], tpu.Lowered]) -> tpu.Program:
        """The program called `key`, compiled now if it has not been, or does not hold any more."""
        if not self.holds(key):
            kept, lowered = self._programs.get(key), lower()
            mark = {"reading": READING, "lowered": lowered.fingerprint, "sources": sources()}
            if kept is None or any(kept[name] != mark[name] for name in ("reading", "lowered")):
                if not self._compile_missing:
                    return tpu.Program.from_dict(self._programs[key]["program"])
                kept = {"program": lowered.compile().as_dict()}
            self._programs[key] = {**kept, **mark}
            self._write()
        return tpu.Program.from_dict(self._programs[key]["program"])

    def _write(self) -> None:
        """One program a line, so that what a run adds can be read in a diff."""
        if self._path is None:
            return
        lines = (
            f"{json.dumps(key)}: {json.dumps(files.plain(kept), allow_nan=False)}"
            for key, kept in sorted(self._programs.items())
        )
        text = ",\n".join(lines)
        files.write_text(
            self._path,
            f'{{"versions": {json.dumps(self._versions)},\n"programs": {{\n{text}\n}}}}\n',
        )


@functools.cache
def sources() -> str:
    """Fingerprint of the code that a step is traced from, comments and docstrings aside."""
    digest = hashlib.sha256()
    for path in _paths():
        digest.update(fingerprint_source(path.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:16]


def _paths() -> Iterator[pathlib.Path]:
    yield from sorted(pathlib.Path(lpa_jax.__file__).parent.rglob("*.py"))
    for module in (assembly, promises, step_cost, tpu):
        yield pathlib.Path(module.__file__)


def fingerprint_source(text: str) -> str:
    """The same for sources that differ in comments, docstrings and layout alone.

    >>> fingerprint_source("def f(): return 1") == fingerprint_source("def f():return(1)  # one")
    True
    """
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            del node.body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
