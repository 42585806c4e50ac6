"""Measurements of `landscape` on one trained model: values, their errors, and curves."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measuring import models as trained
from experiments.measuring.models import Model
from experiments.measuring.settings import Batches, Measuring
from experiments.methods import names as methods
from experiments.methods.build import assemble
from experiments.training.task import LARGEST_EVALUATION_BATCH, evaluation_batches
from lpa_jax import diagnostics, metrics, tables
from lpa_jax.diagnostics import corruptions
from lpa_jax.injection import INPUT, LOGITS, Pass

Array = jax.Array
# {"values": {name: number}, "errors": {name: the estimator's standard error}, curves and maps}
Measured = dict[str, Any]

# Perturbations whose growth is measured, and its bound.
PROBES = ("lpa", "adversarial", "random", "bound")
# Directions, probes and starting vectors are the same for every model.
_KEY = 0


def flatness(model: Model, how: Measuring) -> Measured:
    """Top eigenvalues, trace and sharpness in weight space, plain and filter-normalised."""
    key, found = jax.random.key(_KEY), how.batches(model)
    values, errors = {}, {}
    for prefix, normalized in (("", False), ("normalized ", True)):
        objective = diagnostics.weight_objective(
            model.network, model.variables, found, filter_normalized=normalized
        )
        values["loss"] = objective.base[0]
        steps = min(how.lanczos_steps, objective.dimension)
        top = diagnostics.top_eigenvalues(objective, how.eigenvalues, rng=key, steps=steps)
        for k in range(how.eigenvalues):
            values[f"{prefix}lambda{k + 1}"] = top.values[k]
            errors[f"{prefix}lambda{k + 1}"] = top.residuals[k]
        trace = diagnostics.trace(objective, rng=key, probes=how.probes)
        average = diagnostics.average_sharpness(objective, how.average_radius, rng=key)
        for name, estimate in (("trace", trace), ("average", average)):
            values[prefix + name] = estimate.value
            errors[prefix + name] = estimate.standard_error
        values[f"{prefix}worst case"] = diagnostics.worst_case_sharpness(
            objective, how.sharpness_radius, steps=5
        )
    return {"values": values, "errors": errors}


def spectrum(model: Model, how: Measuring) -> Measured:
    """Density of all eigenvalues of the Hessian in weight space, by quadrature.

    effective rank: (sum |lambda|)^2 / sum lambda^2, the number of nonzero eigenvalues if all were
    equal; negative share: sum of |lambda| over negative lambda / sum of |lambda|.
    """
    objective = diagnostics.weight_objective(model.network, model.variables, how.batches(model))
    size = objective.dimension
    found = diagnostics.spectral_quadrature(
        objective,
        rng=jax.random.key(_KEY),
        probes=how.spectrum_probes,
        steps=min(how.lanczos_steps, size),
    )
    nodes = np.nan_to_num(found.nodes)
    total, negative = ((found.weights * part).sum(axis=1)
                       for part in (np.abs(nodes), np.maximum(-nodes, 0.0)))  # fmt: skip
    squares = (found.weights * nodes**2).sum(axis=1)
    by_probe = {
        "trace": size * (found.weights * nodes).sum(axis=1),
        "effective rank": size * total**2 / squares,
        "negative share": negative / total,
    }
    estimates = {name: diagnostics.Estimate.over(each) for name, each in by_probe.items()}
    ends = {"largest": np.nanmax(found.nodes), "smallest": np.nanmin(found.nodes)}
    return {
        "values": ends | {name: estimate.value for name, estimate in estimates.items()},
        "errors": {name: estimate.standard_error for name, estimate in estimates.items()},
        "nodes": found.nodes,
        "weights": found.weights,
    }


def activation(model: Model, how: Measuring) -> Measured:
    """Largest eigenvalue, trace and worst case in activation space, layer by layer."""
    found, values, errors = how.batches(model), {}, {}
    for layer in how.measure_layers:
        norm = float(_mean_norm(model.network, model.variables, found[0]["image"], layer=layer))
        measured = diagnostics.activation_flatness(
            model.network,
            model.variables,
            found,
            layer,
            radius=how.activation_radius * norm,
            rng=jax.random.key(_KEY),
        )
        values[f"{layer} norm"] = norm
        for name, estimate in (
            ("lambda1", measured.largest_eigenvalue),
            ("trace", measured.trace),
            ("worst case", measured.worst_case),
        ):
            values[f"{layer} {name}"] = estimate.value
            errors[f"{layer} {name}"] = estimate.standard_error
    return {"values": values, "errors": errors}


def line(model: Model, how: Measuring) -> Measured:
    """The loss along random filter-normalised directions, [directions, 2 resolution + 1]."""
    objective, directions, _ = _plane(model, how, how.directions)
    steps = np.linspace(-how.span, how.span, 2 * how.resolution + 1)
    losses = np.stack([diagnostics.loss_slice(objective, d[None], [steps]) for d in directions])
    ends = losses[:, [0, -1]].mean()
    return {
        "values": {"rise at the ends": ends - losses[:, how.resolution].mean()},
        "errors": {},
        "steps": steps,
        "losses": losses,
    }


def plane(model: Model, how: Measuring) -> Measured:
    """The loss over a plane of two such directions, [resolution, resolution]."""
    objective, directions, steps = _plane(model, how, 2)
    losses = diagnostics.loss_slice(objective, directions, [steps, steps])
    return {"values": {}, "errors": {}, "steps": steps, "losses": losses}


def amplification(model: Model, how: Measuring) -> Measured:
    """Mean gains from every layer to every later one, and their local bound, on a full batch."""
    network, variables, key = model.network, model.variables, jax.random.key(_KEY)
    batch, layers = _full(how.batches(model))[0], network.layers
    maps = {probe: np.full((len(layers), len(layers)), np.nan) for probe in PROBES}
    for row, layer in enumerate(layers[:-1]):
        probe = partial(
            _probed, layer=layer, counts=model.task.counts, radius=how.probe_radius,
            assignment=how.probe_assignment,
        )  # fmt: skip
        deltas = {
            name: probe(network, variables, batch, key, name=name).delta
            for name in ("lpa", "adversarial")
        }
        deltas["random"] = diagnostics.random_directions(key, deltas["lpa"])
        for name, delta in deltas.items():
            gains = _gains(network, variables, batch["image"], delta, layer=layer)
            for target, gain in gains.items():
                mean = metrics.compute(metrics.mean(gain, jnp.isfinite(gain)))
                maps[name][row, layers.index(target)] = mean
        for target in diagnostics.layers_above(network, layer):
            bound = diagnostics.local_bound(
                network,
                variables,
                batch["image"],
                layer,
                target,
                rng=key,
                iterations=how.power_iterations,
            )
            maps["bound"][row, layers.index(target)] = bound.sigma.mean()
    values = {
        f"{name} {layer}": maps[name][row, -1]
        for name in PROBES
        for row, layer in enumerate(layers[:-1])
    }
    return {"values": values, "errors": {}, "layers": layers, "maps": maps}


def geometry(model: Model, how: Measuring) -> Measured:
    """Effect of LPA's perturbation on every class at input, measured layers and logits.

    The half-space of `signed` keeps positive classes from shrinking by construction. In `free` the
    loss alone decides the norm, which shows whether expansive is positive.
    """
    wanted = (INPUT, *how.measure_layers, LOGITS)
    layers = [layer for layer in model.network.layers if layer in wanted]
    values, classes = {}, {}
    for form in how.probe_geometries:
        classes[form] = {layer: _classes(model, how, layer, form) for layer in layers}
        for layer, found in classes[form].items():
            own = _by_sign(found)
            agreed = _agreement(found)
            for name in ("correlation", "loss_and_norm", "sign_and_loss", "sign_and_norm"):
                own[name] = getattr(agreed, name, float("nan"))
            values |= {f"{form} at {layer}: {name}": value for name, value in own.items()}
    return {"values": values, "errors": {}, "layers": layers, "classes": classes}


def _classes(model: Model, how: Measuring, layer: str, form: str) -> dict[str, np.ndarray]:
    """Measures of every class over all full batches, [C] each."""
    counts, key, total = model.task.counts, jax.random.key(_KEY), None
    for batch in _full(how.batches(model)):
        seen = _probed(
            model.network, model.variables, batch, key,
            name="lpa", layer=layer, counts=counts, radius=how.probe_radius,
            assignment=how.probe_assignment, form=form,
        )  # fmt: skip
        pairs = diagnostics.class_geometry(seen, batch["label"], len(counts))
        total = pairs if total is None else metrics.add(total, pairs)
    return metrics.compute(total)


_CLASS_MEASURES = (
    "norm_ratio", "loss_change", "cosine", "radius", "log_odds_change", "shared_shift", "lpl_cosine"
)  # fmt: skip


def _by_sign(found: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over the classes of a sign, each class with the same weight."""
    means = {}
    for group, sign in (("positive", 1), ("negative", -1)):
        # The sign may change between batches: that of the most images counts.
        chosen = np.sign(np.nan_to_num(found["sign"])) == sign
        for name in _CLASS_MEASURES:
            known = found[name][chosen & np.isfinite(found[name])]
            means[f"{name} {group}"] = known.mean() if known.size else float("nan")
    return means


def _agreement(found: Mapping[str, np.ndarray]) -> diagnostics.Agreement | None:
    """Agreement of loss and norm, None if fewer than two classes moved."""
    try:
        return diagnostics.agreement(found)
    except ValueError:
        return None


def calibration(model: Model, how: Measuring) -> Measured:
    """Accuracy, likelihood and calibration on the evaluation images, and on corrupted ones."""
    clean = trained.outputs(model)
    curve = diagnostics.reliability(clean.logits, clean.labels)
    values = {
        "accuracy": _accuracy(clean),
        "nll": diagnostics.negative_log_likelihood(clean.logits, clean.labels),
        "ece": curve.expected_calibration_error,
        "adaptive ece": diagnostics.expected_calibration_error(
            clean.logits, clean.labels, adaptive=True
        ),
    }
    by_severity = {}
    for name in how.corruptions:
        by_severity[name] = [
            _accuracy(trained.outputs(model, _corrupted(model, name, severity)))
            for severity in how.severities
        ]
        values[f"accuracy {name}"] = np.mean(by_severity[name])
    values["accuracy corrupted"] = np.mean(list(by_severity.values()))
    reliability = {"confidence": curve.confidence, "accuracy": curve.accuracy, "count": curve.count}
    return {
        "values": values,
        "errors": {},
        "by_severity": by_severity,
        "severities": how.severities,
        "reliability": reliability,
    }


_IMAGES = ("measure_on", "measure_batches", "measure_batch_size")
_SLICE = (*_IMAGES, "resolution", "span")
_PROBE = ("probe_radius", "probe_assignment")
# name -> (function, fields of `Measuring` that decide its result)
MEASUREMENTS: dict[str, tuple[Callable[[Model, Measuring], Measured], tuple[str, ...]]] = {
    "flatness": (
        flatness,
        (*_IMAGES, "eigenvalues", "lanczos_steps", "probes", "sharpness_radius", "average_radius"),
    ),
    "spectrum": (spectrum, (*_IMAGES, "lanczos_steps", "spectrum_probes")),
    "activation": (activation, (*_IMAGES, "measure_layers", "activation_radius")),
    "line": (line, (*_SLICE, "directions")),
    "plane": (plane, _SLICE),
    "amplification": (amplification, (*_IMAGES, *_PROBE, "power_iterations")),
    "geometry": (geometry, (*_IMAGES, *_PROBE, "measure_layers", "probe_geometries")),
    "calibration": (calibration, ("corruptions", "severities")),
}


def _plane(model, how, count):
    objective = diagnostics.weight_objective(model.network, model.variables, how.batches(model))
    directions = diagnostics.filter_normalized_directions(
        jax.random.key(_KEY), model.variables["params"], count
    )
    return objective, directions, np.linspace(-how.span, how.span, how.resolution)


def _full(batches: Batches) -> Batches:
    """The batches without padding, at least one; class means would count padded rows."""
    return [batch for batch in batches if np.all(batch["mask"])]


def _corrupted(model: Model, name: str, severity: int):
    """Evaluation batches, corrupted and then normalised."""
    task, start = model.task, 0
    size = min(LARGEST_EVALUATION_BATCH, len(task.evaluation))
    for batch in evaluation_batches(task.evaluation, size):
        positions = np.arange(start, start + size)
        images = _corruption(name, severity)(jax.random.key(_KEY), batch["image"], positions)
        start += size
        yield {**batch, "image": task.normalization.apply(images)}


@cache
def _corruption(name: str, severity: int):
    return jax.jit(corruptions.create(name, severity))


def _accuracy(found: trained.Outputs) -> float:
    return float(np.mean(found.logits.argmax(axis=1) == found.labels))


@partial(
    jax.jit, static_argnames=("network", "name", "layer", "counts", "radius", "assignment", "form")
)
def _probed(
    network, variables, batch, rng, *, name, layer, counts, radius, assignment, form="signed"
):
    """Observation of `lpa` or `adversarial` at a layer of any trained network."""
    options = {f"{name}.radius": radius}
    if name == "lpa":
        options |= {"lpa.mode": "cold", "lpa.geometry": form, "lpa.assignment": assignment}
    method = f"{name}@{layer}"
    parts = assemble(
        method,
        methods.options_for(method, options, {}),
        layers=network.layers,
        layer=None,
        counts=counts,
    )
    return diagnostics.observe(network, variables, batch, parts.perturbations, rng=rng)[layer]


@partial(jax.jit, static_argnames=("network", "layer"))
def _gains(network, variables, inputs, delta, *, layer):
    return diagnostics.gains(network, variables, inputs, layer, delta)


@partial(jax.jit, static_argnames=("network", "layer"))
def _mean_norm(network, variables, inputs, *, layer):
    h, _ = network.run(Pass(variables, inputs), {}, layer)
    return jnp.mean(tables.row_norms(tables.at_least_float32(h)))
