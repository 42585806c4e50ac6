"""Where a perturbation is injected: cutting a network at any of its layers."""

from lpa_jax.injection.accumulation import accumulate
from lpa_jax.injection.api import (
    as_network,
    decode,
    encode,
    inject,
    nnx_submodule_paths,
    submodule_paths,
)
from lpa_jax.injection.base import (
    INPUT,
    LOGITS,
    Network,
    Pass,
    Tap,
    Variables,
    activation_shapes,
    check_layer,
    model_state,
    run_perturbed,
)
from lpa_jax.injection.batches import check_examples, names_of, read_batch, with_batch_names
from lpa_jax.injection.functions import CutFunctions
from lpa_jax.injection.staged import StagedNetwork

__all__ = [
    "INPUT", "LOGITS", "CutFunctions", "Network", "Pass", "StagedNetwork", "Tap", "Variables",
    "accumulate", "activation_shapes", "as_network", "check_examples", "check_layer", "decode",
    "encode", "inject", "model_state", "names_of", "nnx_submodule_paths", "read_batch",
    "run_perturbed", "submodule_paths", "with_batch_names",
]  # fmt: skip
