"""What a run writes down of its epochs and at its end; programs are `program.Program`s."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.images.settings import shot_groups
from experiments.training.log import Logging
from lpa_jax import metrics
from lpa_jax.training import loop as trainer
from lpa_jax.training.step import TrainState


def effects(program, state: TrainState, probe: Mapping[str, Any]) -> dict[str, float]:
    """What the perturbations do by sign group, on one batch, and how their radii have adapted."""
    effect = {} if program.effect is None else metrics.compute(program.effect(state, probe))
    return {f"effect/{name}": value for name, value in effect.items()} | adapted_radii(state)


def adapted_radii(state: TrainState) -> dict[str, float]:
    """Factors on the radii of perturbations with a `radius_target`, by layer and sign group."""
    kept = jax.tree_util.tree_leaves_with_path(dict(state.perturbation_state))
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in kept}
    return {
        f"effect/{name}/{group}": float(factor)
        for name, factors in named.items()
        if name.endswith("/radius_scale")
        for group, factor in zip(("positive", "negative"), jax.device_get(factors), strict=True)
    }


def classes(program, state: TrainState, probes) -> dict[str, np.ndarray]:
    """What the perturbations do to every class, over all probes, [C] a measure."""
    if program.classes is None or not probes:
        return {}
    total = None
    for probe in probes:
        pairs = program.classes(state, probe)
        total = pairs if total is None else metrics.add(total, pairs)
    return {
        f"classes/{layer}/{name}": values
        for layer, geometry in total.items()
        for name, values in metrics.compute(geometry).items()
    }


def details(logging: Logging, state: TrainState, record: trainer.EpochRecord) -> dict[str, Any]:
    """Weights and accuracies of classes, for TensorBoard, at evaluations."""
    if logging.tensorboard != "full" or record.evaluation is None:
        return {}
    return {
        "weights": jax.device_get(state.params),
        "class_accuracy": np.asarray(record.evaluation["per_class_accuracy"]),
    }


def scalars(record: trainer.EpochRecord) -> dict[str, float]:
    """What training and evaluation said of an epoch."""
    scalars = {"epoch": record.epoch, "step": record.step}
    scalars |= {f"train/{name}": value for name, value in record.train.items()}
    if record.evaluation is not None:
        scalars |= {f"evaluation/{name}": record.evaluation[name] for name in ("loss", "accuracy")}
    scalars["examples_per_second"] = record.examples_per_second
    return scalars


def final_metrics(evaluation: Mapping[str, Any], counts: tuple[int, ...]) -> dict[str, Any]:
    """What the last evaluation says of the run."""
    per_class = np.asarray(evaluation["per_class_accuracy"])
    groups = {
        name: float(np.nanmean(per_class[members])) for name, members in shot_groups(counts).items()
    }
    return {
        "accuracy": evaluation["accuracy"],
        "loss": evaluation["loss"],
        "per_class_accuracy": per_class,
        "group_accuracy": groups,
    }
