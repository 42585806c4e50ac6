"""Weight and activation space against dense Hessians and losses computed in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import lpa_jax
from lpa_jax import diagnostics, injection
from tests.helpers import toy

KEY = jax.random.key(0)
LABELS = np.array([0, 1, 1, 2, 0, 1, 2, 0, 1], np.int32)  # class 3 is absent
RADIUS = 0.3


@pytest.fixture(scope="module")
def network():
    return injection.StagedNetwork(toy.NormalizedMLP(toy.CLASSES, dropout=0.5))


@pytest.fixture(scope="module")
def variables(network):
    """Running statistics that no batch of ours has."""
    fresh = network.init(jax.random.key(1), toy.batch()["image"])
    shift = {"mean": 0.2, "var": 0.7}
    statistics = jax.tree_util.tree_map_with_path(
        lambda path, v: v + shift[path[-1].key], fresh["batch_stats"]
    )
    return {**fresh, "batch_stats": statistics}


@pytest.fixture(scope="module")
def whole():
    return toy.batch(LABELS)


@pytest.fixture(scope="module")
def batches(whole):
    """The same examples in three batches: unequal, and the last one padded."""
    padded = {name: np.concatenate([v[6:], v[:1]]) for name, v in whole.items()}
    return [
        {name: v[:4] for name, v in whole.items()} | {"position": np.arange(4)},
        {name: v[4:6] for name, v in whole.items()},
        padded | {"mask": np.array([1.0, 1.0, 1.0, 0.0])},
    ]


@pytest.fixture(scope="module")
def weight_loss(network, variables, whole):
    """(loss of the flat parameters, the flat parameters)"""
    flat, unravel = ravel_pytree(variables["params"])
    targets = jax.nn.one_hot(whole["label"], toy.CLASSES)

    @jax.jit
    def loss(flat):
        moved = {**variables, "params": unravel(flat)}
        logits = lpa_jax.encode(network, moved, whole["image"], "logits")
        return jnp.mean(lpa_jax.cross_entropy(logits, targets))

    return loss, flat


@pytest.fixture(scope="module")
def dense(weight_loss):
    loss, flat = weight_loss
    return np.asarray(jax.jit(jax.hessian(loss))(flat))


@pytest.fixture(scope="module")
def weights(network, variables, batches):
    return diagnostics.weight_objective(network, variables, batches)


def test_eigenvalues_in_weight_space_are_those_of_the_dense_hessian(weights, dense):
    found = diagnostics.top_eigenvalues(weights, 3, rng=KEY, steps=40)
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(dense)[:-4:-1], rtol=1e-3)


def test_products_gradients_and_values_do_not_depend_on_the_batches(weights, weight_loss, dense):
    loss, flat = weight_loss
    shift = 0.1 * np.random.default_rng(0).normal(size=flat.shape).astype(np.float32)
    np.testing.assert_allclose(weights.base, loss(flat), rtol=1e-5)
    np.testing.assert_allclose(weights.value(shift[None]), loss(flat + shift), rtol=1e-5)
    expected = jax.grad(loss)(flat + shift)
    np.testing.assert_allclose(weights.gradient(shift[None])[0], expected, atol=1e-5)
    product = weights.hessian_product(shift[None])[0]
    np.testing.assert_allclose(product, dense @ shift, atol=1e-4)


def test_the_trace_in_weight_space_lies_within_its_standard_errors(weights, dense):
    estimate = diagnostics.trace(weights, rng=KEY, probes=20)
    assert abs(estimate.value - np.trace(dense)) < 4 * estimate.standard_error
    variance = 2 * (np.sum(dense**2) - np.sum(np.diag(dense) ** 2)) / 20
    np.testing.assert_allclose(estimate.standard_error, np.sqrt(variance), rtol=0.5)


def test_the_spectral_density_of_the_weights_is_that_of_the_dense_hessian(weights, dense):
    eigenvalues = np.linalg.eigvalsh(dense)
    width = 0.05 * np.ptp(eigenvalues)
    found = diagnostics.spectral_density(weights, rng=KEY, probes=20, steps=30, width=width)
    exact = np.exp(-0.5 * ((found.grid[:, None] - eigenvalues) / width) ** 2).mean(axis=1)
    exact /= width * np.sqrt(2 * np.pi)
    slack = 4 * found.standard_error + 0.01 * exact.max()
    assert np.mean(np.abs(found.density - exact) < slack) > 0.97
    assert np.mean(np.abs(found.density - exact)) < 0.2 * exact.mean()


def filter_scales(params):
    """Filter norms as loops: the weights into one output, the size of a vector's entry."""
    scales = {}
    for path, w in jax.tree_util.tree_leaves_with_path(params):
        t = np.abs(np.array(w))
        if t.ndim > 1:
            for f in range(t.shape[-1]):
                t[..., f] = np.sqrt(np.sum(t[..., f] ** 2))
        scales[path] = t
    return np.concatenate([t.ravel() for t in scales.values()])


def test_filter_normalised_coordinates_scale_the_hessian_and_sams_step(
    network, variables, batches, weight_loss, dense
):
    loss, flat = weight_loss
    scale = filter_scales(variables["params"])
    objective = diagnostics.weight_objective(network, variables, batches, filter_normalized=True)
    v = np.random.default_rng(0).normal(size=flat.shape).astype(np.float32)
    expected = scale * (dense @ (scale * v))
    np.testing.assert_allclose(objective.hessian_product(v[None])[0], expected, atol=1e-4)
    slope = scale * np.asarray(jax.grad(loss)(flat))
    step = RADIUS * scale * slope / np.linalg.norm(slope)
    rise = diagnostics.worst_case_sharpness(objective, RADIUS)
    np.testing.assert_allclose(rise, loss(flat + step) - loss(flat), rtol=1e-3)


def test_filter_norms_are_over_all_axes_but_the_last():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 5)).astype(np.float32)
    expected = np.linalg.norm(kernel.reshape(-1, 5), axis=0)
    norms = diagnostics.filter_norms(jnp.asarray(kernel))
    np.testing.assert_allclose(norms, expected.reshape(1, 1, 1, 5), rtol=1e-6)


@pytest.fixture(scope="module")
def decoded(network, variables, whole):
    """Activations at hidden1; losses, slopes and Hessians of all examples at activations there."""
    h = lpa_jax.encode(network, variables, whole["image"], "hidden1")
    targets = jax.nn.one_hot(whole["label"], toy.CLASSES)

    def loss(h, target):
        logits = lpa_jax.decode(network, variables, h[None], "hidden1")
        return lpa_jax.cross_entropy(logits, target[None])[0]

    def of_all(function):
        mapped = jax.vmap(function)
        return jax.jit(lambda h: mapped(h, targets))

    losses, slopes, hessians = map(of_all, (loss, jax.grad(loss), jax.hessian(loss)))
    return np.asarray(h), losses, np.asarray(slopes(h)), np.asarray(hessians(h))


def test_class_level_curvature_is_the_mean_over_members(network, variables, batches, decoded):
    *_, hessians = decoded
    objective = diagnostics.activation_objective(network, variables, batches, "hidden1")
    found = diagnostics.top_eigenvalues(objective, 2, rng=KEY, steps=8).values
    estimate = diagnostics.trace(objective, rng=KEY, probes=60)
    for c in range(3):
        mean = hessians[c == LABELS].mean(axis=0)
        np.testing.assert_allclose(found[c], np.linalg.eigvalsh(mean)[:-3:-1], atol=1e-4)
        error = abs(estimate.value[c] - np.trace(mean))
        assert error < 4 * estimate.standard_error[c] + 1e-5
    assert np.isnan(found[3]).all() and np.isnan(estimate.value[3])


def test_class_level_sharpness_is_the_loss_that_the_shared_step_causes(
    network, variables, batches, decoded
):
    h, losses, slopes, _ = decoded
    objective = diagnostics.activation_objective(network, variables, batches, "hidden1")
    found = diagnostics.worst_case_sharpness(objective, RADIUS)
    moved = np.array(h)
    for c in range(3):
        slope = slopes[c == LABELS].mean(axis=0, keepdims=True)
        moved[c == LABELS] += RADIUS * slope / np.linalg.norm(slope)
    rise = np.asarray(losses(moved) - losses(h))
    for c in range(3):
        np.testing.assert_allclose(found[c], rise[c == LABELS].mean(), rtol=1e-3, atol=1e-6)


def test_example_level_flatness_over_batches_counts_each_example_once(
    network, variables, batches, decoded
):
    h, losses, slopes, hessians = decoded
    found = diagnostics.activation_flatness(
        network, variables, batches, "hidden1", radius=RADIUS, rng=KEY, ascent_steps=1, probes=30
    )
    assert found.rows == len(LABELS)
    largest = np.linalg.eigvalsh(hessians)[:, -1]
    np.testing.assert_allclose(found.largest_eigenvalue.value, largest.mean(), rtol=1e-3)
    error = largest.std(ddof=1) / np.sqrt(len(LABELS))
    np.testing.assert_allclose(found.largest_eigenvalue.standard_error, error, rtol=1e-3)
    trace = np.trace(hessians, axis1=1, axis2=2).mean()
    np.testing.assert_allclose(found.trace.value, trace, rtol=0.1)
    rise = losses(h + RADIUS * slopes / np.linalg.norm(slopes, axis=1, keepdims=True)) - losses(h)
    np.testing.assert_allclose(found.worst_case.value, rise.mean(), rtol=1e-3)


def test_curvature_at_the_logits_is_the_softmax_covariance(network, variables, whole):
    objective = diagnostics.activation_objective(
        network, variables, [whole], "logits", level="example"
    )
    p = np.asarray(jax.nn.softmax(lpa_jax.encode(network, variables, whole["image"], "logits")))
    covariance = p[:, :, None] * np.eye(toy.CLASSES) - p[:, :, None] * p[:, None, :]
    found = diagnostics.top_eigenvalues(objective, 1, rng=KEY, steps=4).values[:, 0]
    np.testing.assert_allclose(found, np.linalg.eigvalsh(covariance)[:, -1], rtol=1e-3)


def test_a_second_checkpoint_costs_no_compilation(network, variables, batches, weights):
    ones = jnp.ones((1, weights.dimension))
    weights.hessian_product(ones)
    doubled = {**variables, "params": jax.tree.map(lambda w: 2 * w, variables["params"])}
    compiled = diagnostics.objective._hessian_product._cache_size()
    other = diagnostics.weight_objective(network, doubled, batches)
    product = other.hessian_product(ones)
    assert diagnostics.objective._hessian_product._cache_size() == compiled
    assert not np.allclose(product, weights.hessian_product(ones))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "hiden"}, "unknown layer 'hiden'; .*: input, hidden1, hidden2, logits"),
        ({"level": "batch"}, "level must be one of class, example, got 'batch'"),
        ({"level": "example"}, "batches must be one batch at level='example', got several"),
        ({"batches": []}, "batches must hold at least one example, got none"),
        ({"batches": iter([])}, "batches must be a collection.*got list_iterator"),
        (
            {"batches": [{**toy.batch(), "label": LABELS[:6] + 3}]},
            r"labels must be in 0\.\.3, got 4 at position 1",
        ),
    ],
)
def test_bad_arguments_are_refused(network, variables, batches, arguments, message):
    good = {"layer": "hidden1", "level": "class", "batches": batches}
    with pytest.raises(ValueError, match=message):
        diagnostics.activation_objective(network, variables, **(good | arguments))


def test_integer_inputs_cannot_be_shifted(network, variables, whole):
    batch = {**whole, "image": np.ones(whole["image"].shape, np.uint8)}
    with pytest.raises(ValueError, match="only a floating activation can be shifted, 'input' is"):
        diagnostics.activation_objective(network, variables, [batch], "input")


def test_a_loss_that_is_not_finite_is_refused(network, variables, whole):
    broken = {**whole, "image": whole["image"] * np.nan}
    with pytest.raises(ValueError, match="the loss over batches must be finite, got nan"):
        diagnostics.weight_objective(network, variables, [broken])
