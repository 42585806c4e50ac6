"""Measurements of `layer_sweep`: similarity of two models, effects of a perturbation."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.measuring.models import Outputs
from lpa_jax import diagnostics
from lpa_jax.diagnostics.geometry import GROUPS


def similarity_of(one: Outputs, other: Outputs, images: int) -> dict[str, float]:
    """Agreement, consistency of errors and CKA of two models on the same images.

    Args:
      one: outputs of a model.
      other: outputs of the other model.
      images: number of images for CKA, drawn at random.

    Returns:
      Values by measure; the CKA of a model whose features do not vary is NaN.
    """
    chosen = np.random.default_rng(0).permutation(len(one.labels))[:images]
    try:
        cka = diagnostics.linear_cka(one.features[chosen], other.features[chosen], debiased=True)
    except ValueError:  # the features of a model are all the same
        cka = float("nan")
    return {
        "agreement": diagnostics.prediction_agreement(one.logits, other.logits),
        "error_consistency": diagnostics.error_consistency(one.logits, other.logits, one.labels),
        "cka": cka,
    }


def effects(result: Mapping[str, Any], layer: str) -> dict[str, float]:
    """Effects of the perturbation at a layer at the end of training, from the log of the run.

    Norm ratio and loss change by sign group, on one batch; if the run logged classes, also the
    correlation of the two over the classes.
    """
    last = result["curve"][-1]
    values = {
        f"{name} {group}": last.get(f"effect/{layer}/{name}/{group}")
        for name in ("norm_ratio", "loss_change")
        for group in GROUPS
    }
    names = ("norm_ratio", "loss_change", "sign", "delta_norm")
    classes = {name: np.array(last.get(f"classes/{layer}/{name}", []), float) for name in names}
    if np.sum(np.nan_to_num(classes["delta_norm"]) > 0) > 1:
        values["correlation of loss and norm"] = diagnostics.agreement(classes).correlation
    return {name: value for name, value in values.items() if value is not None}
