"""A file of compiled programs, with which a stopped grid resumes without compiling again.

The key of a program is a hash of everything that decides what is read from it: the lowered text and
the devices that the compiler gets, the versions and flags of the compiler, and the code that reads
its answer. A change in any of them compiles the program again, so the file never holds a number
that this code would not give.
"""

import hashlib
import importlib.metadata
import os
import pathlib
from collections.abc import Callable, Hashable

from experiments.compiled import hlo, step_cost, tpu
from experiments.runtime import files

PACKAGES = ("jax", "jaxlib", "libtpu")
COMPILER_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


class Programs:
    """Compiled programs, read from a file or compiled and added to it.

    Args:
      path: the file; None keeps programs in memory alone.
      compile_missing: whether `get` compiles what the file lacks.

    Raises:
      ValueError: the file is there and was not written by this class.
    """

    def __init__(self, path: str | None, compile_missing: bool = True):
        self._path = path
        self._compile_missing = compile_missing
        self._by_key: dict[str, tpu.Program] = {}
        self._by_name: dict[Hashable, tpu.Program | None] = {}
        if path is None or not pathlib.Path(path).exists():
            return
        try:
            kept = files.read_json(path)["compiled_programs"].items()
            self._by_key = {key: tpu.Program.from_dict(values) for key, values in kept}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"--output must name a file of compile_check, got {path!r}") from None

    def get(self, name: Hashable, lower: Callable[[], tpu.Lowered]) -> tpu.Program | None:
        """The program that `lower` lowers; None if it is missing and is not to be compiled.

        Args:
          name: within this process; a program of the same name is not lowered again.
          lower: traces and lowers the program, which takes seconds. Compiling takes minutes.
        """
        if name not in self._by_name:
            lowered = lower()
            key = key_of(lowered)
            if key not in self._by_key and self._compile_missing:
                self._by_key[key] = lowered.compile()
                if self._path is not None:
                    kept = {key: program.as_dict() for key, program in self._by_key.items()}
                    files.write_json(self._path, {"compiled_programs": kept})
            self._by_name[name] = self._by_key.get(key)
        return self._by_name[name]


def key_of(lowered: tpu.Lowered) -> str:
    """Hash of everything that decides what `lowered.compile()` returns, compile time aside."""
    parts = [lowered.text, lowered.target]
    parts += [importlib.metadata.version(name) for name in PACKAGES]
    parts += [os.environ.get(name, "") for name in COMPILER_FLAGS]
    parts += [pathlib.Path(module.__file__).read_text("utf-8") for module in (hlo, step_cost, tpu)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
