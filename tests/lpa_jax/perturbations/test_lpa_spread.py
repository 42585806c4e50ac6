"""Cold LPA where a device has fewer examples than the batch has classes: rows by example."""

import dataclasses

import jax
import numpy as np
import pytest

from lpa_jax import assignment
from lpa_jax.perturbations import lpa
from tests.helpers.lpa_batches import CLASSES, LABELS, MULTIPLIER, SIGN, Batch

AXIS = "devices"
MANY = 9  # more classes than the batch has examples
OPTIONS = [
    (CLASSES, "signed", "l2", "full"),
    (CLASSES, "free", "linf", "channel"),
    (MANY, "flipped", "l2", "channel"),
    (MANY, "signed", "linf", "full"),
]


def signs(num_classes):
    return assignment.custom(np.resize(SIGN, num_classes), np.resize(MULTIPLIER, num_classes))


def one_device(perturbation, batch):
    """The function of one device's examples, for `jax.vmap` or `jax.make_jaxpr`."""

    def apply(activation, targets, labels):
        site = dataclasses.replace(
            batch.site(), activation=activation, targets=targets, labels=labels, axis_name=AXIS
        )
        return perturbation.apply({}, site).activation

    return apply


def shares(batch, devices):
    site = batch.site()
    return [
        np.reshape(values, (devices, -1, *values.shape[1:]))
        for values in (site.activation, site.targets, site.labels)
    ]


@pytest.mark.parametrize(("num_classes", "geometry", "norm", "shape"), OPTIONS)
@pytest.mark.parametrize("devices", [6, pytest.param(3, marks=pytest.mark.slow)])
def test_contract_07_few_examples_a_device(num_classes, geometry, norm, shape, devices, x64):
    """Classes 0 and 3 are spread over several devices."""
    batch = Batch(num_classes=num_classes)
    options = {"geometry": geometry, "norm": norm, "shape": shape}
    perturbation = lpa(0.5, steps=2, assignment=signs(num_classes), **options)
    whole = jax.jit(lambda: perturbation.apply({}, batch.site()).activation)()
    assert np.max(np.abs(whole - batch.activations)) > 0.05
    apply = jax.jit(jax.vmap(one_device(perturbation, batch), axis_name=AXIS))
    spread = apply(*shares(batch, devices))
    np.testing.assert_allclose(spread.reshape(whole.shape), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_classes", [CLASSES, MANY])
def test_a_device_computes_no_rows_but_those_of_its_examples(num_classes, x64):
    """What touches a whole table is its sum over the devices, nothing else."""
    batch = Batch(num_classes=num_classes)
    slots = min(num_classes, len(LABELS))

    def table_operations(devices):
        mapped = jax.make_jaxpr(
            one_device(lpa(0.5, steps=2, assignment=signs(num_classes)), batch),
            axis_env=[(AXIS, devices)],
        )(*(values[0] for values in shares(batch, devices)))
        features = int(np.prod(batch.activations.shape[1:]))
        return {
            equation.primitive.name
            for equation in _equations(mapped.jaxpr)
            for result in equation.outvars
            if result.aval.size == slots * features
        }

    moves = {"broadcast_in_dim", "scatter-add", "psum", "reshape", "jit"}
    assert {"scatter-add", "psum"} <= table_operations(3) <= moves
    assert "mul" in table_operations(1) - moves  # with all examples on it a device does


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
