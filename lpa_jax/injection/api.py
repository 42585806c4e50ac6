"""Cutting a network, and running the parts below and above an injection point."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn

from lpa_jax import checks
from lpa_jax.injection.base import INPUT, LOGITS, Array, Network, Pass, Variables, check_layer
from lpa_jax.injection.functions import CutFunctions
from lpa_jax.injection.linen_module import inject_linen
from lpa_jax.injection.listing import cut_points
from lpa_jax.injection.outputs import as_keys
from lpa_jax.injection.staged import StagedNetwork
from lpa_jax.injection.submodules import InjectedModule

if TYPE_CHECKING:
    from flax import nnx


def inject(
    module: "nn.Module | nnx.Module",
    *paths: str,
    call: Callable[..., Any] | None = None,
    select: Mapping[str, Any] | None = None,
    **options: Any,
) -> Network:
    """Cuts an existing Linen or NNX module at named submodules, without editing it.

    The output of each named submodule becomes an injection point. The module's running statistics
    and random streams keep working; statistics are updated once per training pass. What modules
    `sow` is dropped, unless a penalty or `perturbed_forward` asks for it.

    The output of a submodule under `remat`, `jit`, `vmap` or `scan` is cut like any other, but not
    what runs inside such a transformation. So cut a scanned stack of layers at its output, write it
    as two stacks to cut between them, or unroll it into a Python loop. `Module.perturb` does not
    lead inside: it adds a variable of the size of the activations of all layers, gives no
    activation for the class means, and every step of PGD would run the whole stack.

    Args:
      module: Takes a batch of inputs, returns logits; any other with `call` and `select`.
      *paths: Paths of submodules in the order of the pass, parts separated by `/`, for example
        `"encoder/block_2"`. `submodule_paths` lists them.
      call: (module, inputs, train, **rngs) -> logits, for a module with several inputs, another
        switch, or further arguments: it calls `module` with the batch's `inputs`, any pytree of
        arrays with the example axis first. `rngs` holds `dropout`, the key of the pass, in training
        mode. A keyword that it names is a further random stream with a key of its own, in both
        modes (the same key in every evaluation); Linen modules can draw from it with `make_rng`.
      select: Layer -> the part of its output that is cut, for submodules that return more than one
        array: an index of a tuple, a key of a dictionary or a field of a dataclass, or a tuple of
        these for nested outputs. `"logits"` names the part of the model's output. Without it, a
        tuple is cut at its first entry if that is its only array of floats with the example axis
        first, and the logits are the entry `logits` or the first entry of a tuple.
      **options: Instead of `call`: `train_argument`, the keyword of `__call__` (or the field of a
        Linen module) that switches training mode, or None if the module has none; and further
        keyword arguments of `__call__`. Without it the keyword is train, training, is_training,
        is_train, deterministic or use_running_average, whichever `__call__` has. NNX modules are
        also switched by their `eval` method; in training they are in the mode in which they were
        cut.

    Returns:
      A `Network` with layers ("input", *paths, "logits").

    Raises:
      ValueError: No path, a path that is named twice or called `input` or `logits`, (NNX) an
        unknown path, `select` for a layer that is not cut, or a training switch that cannot be
        determined. A Linen path that is not called, a path that is called twice in a pass or whose
        activation is unclear, and a Linen module with Dropout or BatchNorm behind `**kwargs`, are
        refused when the module first runs.

    Example:
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, ids, mask, deterministic=True):
      ...         h = nn.Embed(10, 8, name="embed")(ids) * mask[..., None]
      ...         return {"scores": nn.Dense(3, name="head")(h.mean(1))}
      >>> def call(module, inputs, train, **rngs):
      ...     return module(inputs["ids"], inputs["mask"], deterministic=not train)
      >>> inject(Net(), "embed", call=call, select={"logits": "scores"}).layers
      ('input', 'embed', 'logits')
    """
    if not paths:
        raise ValueError("paths must name at least one submodule, got none")
    for path in paths:
        checks.instance("paths", path, str, "names of submodules such as 'encoder/block_2'")
    repeated = [path for path in paths if paths.count(path) > 1 or path in (INPUT, LOGITS)]
    if repeated:
        raise ValueError(f"paths must be distinct and not input or logits, got {repeated[0]!r}")
    checks.instance("select", select or {}, Mapping, "a dictionary {layer: part of its output}")
    selected = tuple((layer, as_keys(keys)) for layer, keys in (select or {}).items())
    for layer, _ in selected:
        checks.choice("a layer of select", layer, (*paths, LOGITS))
    return _cut(module, paths, select=selected, call=call, **options)


def submodule_paths(
    module: "nn.Module | nnx.Module",
    inputs: Any,
    *,
    call: Callable[..., Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The submodules at which `inject` can cut a module, with the shapes of what they return.

    Nothing is computed: the module is only traced, in evaluation mode. Submodules that are called
    twice in a pass, run inside a scan or return no floats for every example are left out.

    Args:
      module: As for `inject`.
      inputs: A batch of inputs, of which only the shapes matter.
      call: As for `inject`.
      **options: As for `inject`.

    Returns:
      Path -> `jax.ShapeDtypeStruct` (or a tuple, dictionary, ... of them: choose with `select`), in
      the order in which the submodules return.

    Example:
      >>> net = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
      >>> import numpy as np
      >>> outputs = submodule_paths(net, np.ones((2, 4)))
      >>> {path: output.shape for path, output in outputs.items()}
      {'layers_0': (2, 8), 'layers_2': (2, 3)}
    """
    paths = nnx_submodule_paths(module) if _is_nnx(module) else ()
    return cut_points(_cut(module, paths, select=(), call=call, **options), inputs)


def nnx_submodule_paths(module: "nnx.Module") -> tuple[str, ...]:
    """Paths of all callable submodules of an NNX module, in the order of its attributes."""
    from lpa_jax.injection import nnx_module

    return nnx_module.submodule_paths(module)


def _cut(module: Any, paths: Sequence[str], **options: Any) -> InjectedModule:
    if _is_nnx(module):
        from lpa_jax.injection.nnx_module import inject_nnx

        return inject_nnx(module, *paths, **options)
    if not isinstance(module, nn.Module):
        has_one = isinstance(getattr(module, "module", None), nn.Module)
        remedy = "cut its `module`" if has_one else "lpa_jax.CutFunctions cuts two functions"
        got = type(module).__name__
        raise ValueError(f"module must be a Linen or NNX module, got {got}; {remedy}")
    return inject_linen(module, *paths, **options)


def _is_nnx(module: Any) -> bool:
    # flax.nnx takes as long to import as the rest of this package; an NNX module brings it along.
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(module, nnx.Module)


def as_network(model: Any) -> Network:
    """The `Network` of a model: itself if it is one, a cut of a staged Linen model otherwise.

    Raises:
      ValueError: The model is neither.
    """
    if isinstance(model, Network):
        return model
    # A field called `layers` does not make a model staged: nn.Sequential has one too.
    layers = getattr(model, "layers", None) if isinstance(model, nn.Module) else None
    if isinstance(layers, Sequence) and (*layers[:1], *layers[-1:]) == (INPUT, LOGITS):
        return StagedNetwork(model)
    raise ValueError(
        f"model must be a staged model or a cut network, got {type(model).__name__}; "
        "cut an existing module with lpa_jax.inject(module, 'path/of/submodule')"
    )


def encode(
    model: Any,
    variables: Variables,
    inputs: Array,
    layer: str,
    *,
    train: bool = False,
    rng: Array | None = None,
) -> Array:
    """The activation h = encode_l(x) at an injection point.

    Args:
      model: A staged model or a `Network`.
      variables: `{"params": ..., ...}`, as from `init`.
      inputs: x, [B, ...].
      layer: The injection point l.
      train: Training mode; new running statistics are dropped.
      rng: Key for dropout in training mode.

    Returns:
      [B, *S].

    Raises:
      ValueError: Unknown `layer`.
    """
    network = as_network(model)
    return network.run(Pass(variables, inputs, train, rng), {}, layer)[0]


def decode(
    model: Any,
    variables: Variables,
    activation: Array,
    layer: str,
    *,
    inputs: Array | None = None,
    train: bool = False,
    rng: Array | None = None,
) -> Array:
    """The logits z = decode_l(h) above an injection point; arguments as for `encode`.

    Args:
      model: A staged model or a `Network`.
      variables: `{"params": ..., ...}`.
      activation: h, [B, *S].
      layer: The injection point l.
      inputs: x; needed if the network was cut by `inject`, which runs the module from its input
        (under jit XLA drops what the result does not depend on).
      train: Training mode; new running statistics are dropped.
      rng: Key for dropout in training mode.

    Returns:
      [B, C].

    Raises:
      ValueError: Unknown `layer`, or `inputs` are missing but needed.
    """
    network = as_network(model)
    check_layer(network.layers, layer)
    innermost = network
    while hasattr(innermost, "network"):
        innermost = innermost.network
    if inputs is None and not isinstance(innermost, StagedNetwork | CutFunctions):
        raise ValueError("inputs are needed to decode a network that was cut by inject")
    given = Pass(variables, inputs, train, rng)
    return network.run(given, {layer: activation}, LOGITS)[0]
