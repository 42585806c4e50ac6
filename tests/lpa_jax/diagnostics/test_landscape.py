"""Loss slices: directions filter by filter, grids against losses computed one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import lpa_jax
from lpa_jax import diagnostics, injection
from tests.helpers import toy

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def network():
    return injection.StagedNetwork(toy.NormalizedMLP(toy.CLASSES))


@pytest.fixture(scope="module")
def variables(network):
    return network.init(jax.random.key(1), toy.batch()["image"])


@pytest.fixture(scope="module")
def objective(network, variables):
    batch = toy.batch()
    halves = [{name: v[part] for name, v in batch.items()} for part in (slice(4), slice(4, 6))]
    return diagnostics.weight_objective(network, variables, halves)


@pytest.fixture(scope="module")
def directions(variables):
    return diagnostics.filter_normalized_directions(KEY, variables["params"])


def test_every_filter_of_a_direction_is_as_long_as_the_networks(variables, directions):
    flat, unravel = ravel_pytree(variables["params"])
    assert directions.shape == (2, flat.size)
    for direction in directions:
        tree = unravel(direction)
        for w, d in zip(jax.tree.leaves(variables["params"]), jax.tree.leaves(tree), strict=True):
            if w.ndim == 1:
                assert not d.any()  # biases and normalisation stay
                continue
            expected = np.linalg.norm(np.asarray(w).reshape(-1, w.shape[-1]), axis=0)
            lengths = np.linalg.norm(np.asarray(d).reshape(-1, w.shape[-1]), axis=0)
            np.testing.assert_allclose(lengths, expected, rtol=1e-5)
    assert abs(directions[0] @ directions[1]) < 0.5 * directions[0] @ directions[0]


def test_a_plane_holds_the_loss_at_every_grid_point(network, variables, objective, directions):
    flat, unravel = ravel_pytree(variables["params"])
    batch = toy.batch()
    targets = jax.nn.one_hot(batch["label"], toy.CLASSES)
    along, across = (-0.5, 0.0, 0.5), (0.0, 1.0)
    found = diagnostics.loss_slice(objective, directions, [along, across])
    assert found.shape == (3, 2)
    for i, a in enumerate(along):
        for j, b in enumerate(across):
            params = unravel(flat + a * directions[0] + b * directions[1])
            moved = {**variables, "params": params}
            logits = lpa_jax.encode(network, moved, batch["image"], "logits")
            expected = jnp.mean(lpa_jax.cross_entropy(logits, targets))
            np.testing.assert_allclose(found[i, j], expected, rtol=1e-5)


def test_a_line_is_the_first_column_of_the_plane(objective, directions):
    steps = (-1.0, 0.0, 1.0)
    line = diagnostics.loss_slice(objective, directions[:1], [steps])
    plane = diagnostics.loss_slice(objective, directions, [steps, (0.0,)])
    np.testing.assert_array_equal(line, plane[:, 0])
    np.testing.assert_array_equal(line[1], objective.base[0])


def test_slices_do_not_see_the_scale_of_a_filter():
    """Scaling a layer by 10 and the next one back changes neither network nor slice."""
    network = injection.CutFunctions(lambda p, x: jax.nn.relu(x @ p["a"]), lambda p, h: h @ p["b"])
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 5)), "b": rng.normal(size=(5, 4))}
    params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)
    scaled = {"a": 10 * params["a"], "b": params["b"] / 10}
    batch = {"image": rng.normal(size=(6, 3)).astype(np.float32), "label": toy.LABELS}
    slices = []
    for p in (params, scaled):
        objective = diagnostics.weight_objective(network, {"params": p}, [batch])
        directions = diagnostics.filter_normalized_directions(KEY, p)
        slices.append(diagnostics.loss_slice(objective, directions, [(0.0, 0.5), (0.0, 0.5)]))
    np.testing.assert_allclose(*slices, rtol=1e-4)


def test_bad_arguments_are_refused(network, variables, objective, directions):
    classes = diagnostics.activation_objective(network, variables, [toy.batch()], "hidden1")
    with pytest.raises(ValueError, match="objective must have one row, got one with 4"):
        diagnostics.loss_slice(classes, directions, [(0,), (0,)])
    with pytest.raises(ValueError, match=r"directions must have shape \[D, \d+\], got \(2, 3\)"):
        diagnostics.loss_slice(objective, directions[:, :3], [(0,), (0,)])
    with pytest.raises(ValueError, match=r"coordinates must be 2 non-empty .* got lengths \[1\]"):
        diagnostics.loss_slice(objective, directions, [(0,)])
    with pytest.raises(ValueError, match=r"coordinates must be 2 non-empty .* lengths \[1, 0\]"):
        diagnostics.loss_slice(objective, directions, [(0,), ()])
    with pytest.raises(ValueError, match="count must be a whole number >= 1, got 0"):
        diagnostics.filter_normalized_directions(KEY, variables["params"], 0)
