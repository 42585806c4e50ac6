"""Arrays that are spread over a mesh: by Explicit axes of `jax.jit`, or by `jax.shard_map`."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lpa_jax.checks import is_known

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
AxisName = str | tuple[str, ...] | None


def in_auto_axes(
    like: Callable[..., Any] = lambda *args, **kwargs: None,
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorates a function of arrays on a mesh, so that the compiler shards what it computes.

    The axes of `jax.make_mesh` are `AxisType.Explicit` unless it is told otherwise: the sharding of
    an array is a part of its type, and every operation must derive that of its result or be told.
    Sums by class, gathers and many networks do not. Such arrays enter the function with their axes
    `AxisType.Auto`, and its results get a type again. Without such arrays, it is called as it is.

    Args:
      like: Arguments of the function -> prefix of the tree of its results, in which an array stands
        for results with its sharding, and None for results that are the same on all devices.

    Example:
      >>> @in_auto_axes(like=lambda total, batch: (total, None))
      ... def step(total, batch):  # the new total has the sharding of the old one
      ...     return total + batch.sum(), batch.max()
    """

    def decorate(function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            given = [*args, *kwargs.values()]
            # The others stay as they are: JAX would sort the layers of perturbations by name.
            places = [place for place, tree in enumerate(given) if _explicit_leaves(tree)]
            if not places:
                return function(*args, **kwargs)
            trees = [given[place] for place in places]
            arrays = [leaf for tree in trees for leaf in _explicit_leaves(tree)]
            mesh = jax.typeof(arrays[0]).sharding.mesh
            if mesh.manual_axes:  # JAX cannot make the other axes Auto in a part of a mesh
                names = ", ".join(map(str, mesh.explicit_axes))
                raise ValueError(
                    "axes of a mesh that shard_map leaves out must be AxisType.Auto, got "
                    f"AxisType.Explicit for {names}"
                )
            replicated = NamedSharding(mesh, PartitionSpec())
            shardings = jax.tree.map(
                lambda leaf: jax.typeof(leaf).sharding if _is_explicit(leaf) else replicated,
                like(*args, **kwargs),
                is_leaf=lambda leaf: leaf is None,
            )

            def call(arrays):
                inside = iter(arrays)
                changed = jax.tree.map(
                    lambda leaf: next(inside) if _is_explicit(leaf) else leaf, trees
                )
                for place, tree in zip(places, changed, strict=True):
                    given[place] = tree
                return function(
                    *given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True))
                )

            # Outside jit, gradients need to be told the mesh.
            known = is_known(arrays[0])
            with jax.set_mesh(arrays[0].sharding.mesh) if known else contextlib.nullcontext():
                return jax.sharding.auto_axes(call, out_sharding=shardings)(arrays)

        return wrapped

    return decorate


def in_own_axes(function: Callable[[Any], Any], like: Any) -> Callable[[Any], Any]:
    """A function of one array, for calls in auto axes: it runs in the axes of the array `like`.

    So it can close over other arrays on the mesh.
    """
    if not _is_explicit(like):
        return function
    return jax.sharding.explicit_axes(function, in_sharding=jax.typeof(like).sharding)


def check_auto_axes(name: str, tree: Any) -> None:
    """Raises ValueError for arrays on a mesh of Explicit axes, outside `in_auto_axes`."""
    if _explicit_leaves(tree):
        raise ValueError(
            f"{name} must be on a mesh whose axes are AxisType.Auto, or your step must be "
            "decorated with lpa_jax.parallel.in_auto_axes, got AxisType.Explicit"
        )


def _is_explicit(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and bool(jax.typeof(leaf).sharding.mesh.explicit_axes)


def _explicit_leaves(tree: Any) -> list[jax.Array]:
    def is_options(node):  # such as perturbations, which may have tuples of layers as keys
        return isinstance(node, Mapping) and any(isinstance(key, tuple) for key in node)

    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_options) if _is_explicit(leaf)]


def check_axis_name(batch: Any, axis_name: AxisName) -> None:
    """Raises ValueError if `shard_map` has split a batch over axes that are not named.

    Only with its check (`check_vma=True`) does JAX tell.
    """
    varying = {name for leaf in jax.tree.leaves(batch) for name in _varying(leaf)}
    missing = varying.difference(_names(axis_name))
    if missing:
        raise ValueError(
            f"axis_name must name the axes that the batch is spread over ({', '.join(missing)}), "
            f"got {axis_name!r}"
        )


def on_this_device(tree: Any, axis_name: AxisName) -> Any:
    """The arrays as this device's own, so that gradients with respect to them stay its own.

    `jax.shard_map` with its default `check_vma=True` knows which arrays are equal on all devices,
    and sums gradients with respect to those over the devices.
    """
    names = _names(axis_name)
    if not names or not set(names) <= set(_varying(jax.lax.axis_index(axis_name))):
        return tree  # under pmap, vmap, or shard_map without the check

    def own(leaf):
        shared = tuple(name for name in names if name not in _varying(leaf))
        return jax.lax.pcast(leaf, shared, to="varying") if shared else leaf

    return jax.tree.map(own, tree)


def _names(axis_name: AxisName) -> tuple[str, ...]:
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _varying(leaf: Any) -> frozenset[str]:
    """The axes of `shard_map` over which an array varies, as far as JAX tells."""
    if not isinstance(leaf, jax.Array):
        return frozenset()
    kind = jax.typeof(leaf)
    # JAX 0.9 has `vma` where 0.10 has `manual_axis_type.varying`.
    return frozenset(kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying)
