"""The submodules at which a module can be cut."""

from collections import Counter
from typing import Any

import jax
from flax.core import tracers

from lpa_jax.injection.base import Pass
from lpa_jax.injection.outputs import Outputs, is_activation, num_examples
from lpa_jax.injection.submodules import InjectedModule


class _Listing(Outputs):
    """Records the shapes of all outputs, and how often each submodule is called."""

    tapping = False

    def __init__(self, inputs: Any):
        self.shapes: dict[str, Any] = {}
        self.calls: Counter[str] = Counter()
        self._examples, self._trace = num_examples(inputs), tracers.current_trace()

    def exchange(self, path: str, output: Any) -> Any:
        cuttable = tracers.current_trace() == self._trace and any(
            is_activation(leaf, self._examples) for leaf in jax.tree.leaves(output)
        )
        self.calls[path] += 1 if cuttable else 2
        self.shapes[path] = jax.tree.map(
            lambda leaf: (
                jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                if isinstance(leaf, jax.Array)
                else leaf
            ),
            output,
        )
        return output


def cut_points(network: InjectedModule, inputs: Any) -> dict[str, Any]:
    """Path -> shapes of the output, for the submodules that `network` can be cut at."""
    found = []

    def run(inputs):
        found.append(_Listing(inputs))
        variables = network.init(jax.random.key(0), inputs)
        network.trace(Pass(variables, inputs), found[0], network.paths)
        return 0

    jax.eval_shape(run, inputs)
    return {path: shapes for path, shapes in found[0].shapes.items() if found[0].calls[path] == 1}
