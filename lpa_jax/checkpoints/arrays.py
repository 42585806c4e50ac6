"""Pytrees as flat, named arrays in a folder, written and read by Orbax."""

import contextlib
import errno
import functools
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]
_MOST_NAMED = 6  # differing arrays in one message


def flatten(prefix: str, tree: Any) -> Arrays:
    """Name -> array on the host for every leaf; a random key becomes its data.

    Example:
      >>> flatten("state", {"w": jnp.ones(2), "inner": [jnp.zeros(())]})
      {'state/inner/0': array(0., dtype=float32), 'state/w': array([1., 1.], dtype=float32)}
    """
    named = _named_leaves(prefix, tree)
    values = jax.device_get([_data(leaf) for _, leaf in named])
    arrays = {name: np.asarray(value) for (name, _), value in zip(named, values, strict=True)}
    if len(arrays) < len(named):
        raise ValueError(f"two leaves of the {prefix} have the same name")
    return arrays


def unflatten(prefix: str, template: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The template's structure with the arrays of that prefix.

    Raises:
      ValueError: Names, shapes or types are not the template's; names what differs.
    """
    named = _named_leaves(prefix, template)
    names = {name for name, _ in named}
    unknown = sorted(name for name in arrays if name.startswith(f"{prefix}/") and name not in names)
    problems = [f"the checkpoint holds {name!r}, which this {prefix} has not" for name in unknown]
    leaves = []
    for name, leaf in named:
        try:
            leaves.append(_restored(name, leaf, arrays, prefix))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        more = len(problems) - _MOST_NAMED
        raise ValueError(
            "; ".join(problems[:_MOST_NAMED]) + (f"; and {more} more differ" if more > 0 else "")
        )
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _restored(name: str, leaf: Any, arrays: Mapping[str, np.ndarray], prefix: str) -> jax.Array:
    wanted = _data(leaf)
    value = np.zeros(wanted.shape, wanted.dtype) if wanted.size == 0 else arrays.get(name)
    if value is None:
        raise ValueError(f"the checkpoint holds no {name!r}, which this {prefix} has")
    if (value.shape, value.dtype) != (wanted.shape, wanted.dtype):
        raise ValueError(
            f"the checkpoint's {name!r} is {value.dtype}{list(value.shape)}, "
            f"this {prefix}'s is {wanted.dtype}{list(wanted.shape)}"
        )
    # A copy: a step that takes over its state's memory must not find it shared with NumPy.
    value = jnp.array(value)
    return (
        jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else value
    )


def _named_leaves(prefix: str, tree: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [
        (f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}", leaf)
        for path, leaf in leaves
    ]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)


def _data(leaf: Any) -> jax.Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)


def write(folder: pathlib.Path, arrays: Arrays) -> None:
    """Writes arrays; Orbax refuses those without entries, which need no saving."""
    with _orbax() as checkpointer:
        checkpointer.save(folder, {name: value for name, value in arrays.items() if value.size})


def read(folder: pathlib.Path) -> Arrays:
    """Reads what `write` wrote."""
    with _orbax() as checkpointer:
        return checkpointer.restore(folder)


@contextlib.contextmanager
def _orbax() -> Iterator[Any]:
    """A synchronous Orbax checkpointer that waits for no other process and logs nothing."""
    import orbax.checkpoint as ocp  # up to two seconds of import that most runs do without

    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process{this}"
    )
    # It logs how it was set up, and its threads what is raised here as well, each with its stack.
    logger = logging.getLogger("absl")
    disabled, logger.disabled = logger.disabled, True
    usual = sys.unraisablehook
    sys.unraisablehook = functools.partial(_report, usual)
    try:
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            yield checkpointer
        # After a failure the hook stays: writes that it cut off end later, in other threads.
        sys.unraisablehook = usual
    finally:
        logger.disabled = disabled


def _report(usual: Callable[[Any], None], unraisable: Any) -> None:
    """Reports an exception as usual, but not of a write that ends after Orbax has given up."""
    if str(unraisable.exc_value) != "Event loop is closed":
        usual(unraisable)


def reason(error: Exception) -> str:
    """One line: what the operating system said, where it did.

    Example:
      >>> reason(ValueError("OUT_OF_RANGE: ... [os_error_code='28']"))
      'No space left on device'
    """
    code = getattr(error, "errno", None)
    found = re.search(r"os_error_code='(\d+)'", str(error))
    code = int(found[1]) if found else code
    if code in errno.errorcode:
        return os.strerror(code)
    return (str(error).splitlines() or [type(error).__name__])[0]
