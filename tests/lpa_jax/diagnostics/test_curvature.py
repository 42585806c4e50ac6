"""The estimators on quadratics whose spectrum is known, and against matfree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matfree import decomp, funm, stochtrace

from lpa_jax import diagnostics
from lpa_jax.diagnostics import curvature, objective_over

KEY = jax.random.key(0)
SIZE = 12
EIGENVALUES = np.array([5.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.2, 0.1, 0.0, -0.5, -1.0, -4.0])


def symmetric(eigenvalues, seed):
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))[0]
    return (basis * eigenvalues) @ basis.T


def quadratic(variables, shift, batch):
    """Sum over the batch's images m of m (b_r . s_r + s_r' A_r s_r / 2)."""
    linear = jnp.sum(variables["b"] * shift, axis=1)
    curved = jnp.einsum("ri,rij,rj->r", shift, variables["A"], shift)
    rows = jnp.asarray(variables["rows"])
    return jnp.sum(batch["image"]) * rows * (linear + 0.5 * curved), len(batch["image"]) * rows


def objective(matrices, slopes=None, rows=None, lead=None):
    matrices = np.asarray(matrices, np.float32)
    slopes = np.zeros(matrices.shape[:2]) if slopes is None else slopes
    rows = np.ones(len(matrices)) if rows is None else rows
    variables = {"A": matrices, "b": np.asarray(slopes, np.float32), "rows": rows}
    variables = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), variables)
    # The mean over all images is 1, over each batch it is not.
    batches = [{"image": np.array([0.5, 0.5], np.float32)}, {"image": np.array([2.0], np.float32)}]
    return objective_over(
        quadratic, variables, batches, rows=len(matrices), dimension=SIZE, lead=lead
    )


@pytest.fixture(scope="module")
def single():
    return objective([symmetric(EIGENVALUES, 0)], lead=())


@pytest.fixture(scope="module")
def table():
    """Three rows, of which the middle one has no examples."""
    matrices = [symmetric(scale * EIGENVALUES, scale) for scale in (1, 2, 3)]
    return objective(matrices, rows=[1.0, 0.0, 1.0])


def test_batches_of_unequal_size_count_by_example(single):
    shift = np.random.default_rng(0).normal(size=(1, SIZE)).astype(np.float32)
    A = symmetric(EIGENVALUES, 0)
    np.testing.assert_allclose(single.value(shift), shift @ A @ shift[0] / 2, rtol=1e-4)
    np.testing.assert_allclose(single.gradient(shift), shift @ A, atol=1e-4)
    np.testing.assert_allclose(single.hessian_product(shift), shift @ A, atol=1e-4)


def test_full_lanczos_finds_every_eigenvalue(single):
    found = diagnostics.top_eigenvalues(single, SIZE, rng=KEY, steps=SIZE)
    np.testing.assert_allclose(found.values, EIGENVALUES, atol=1e-4)
    assert found.values.shape == (SIZE,) and found.residuals.max() < 1e-3


def test_an_eigenvalue_lies_within_the_residual_of_each_ritz_value(single):
    found = diagnostics.top_eigenvalues(single, 3, rng=KEY, steps=5)
    distance = np.abs(found.values[:, None] - EIGENVALUES).min(axis=1)
    assert np.all(distance <= found.residuals + 1e-4) and distance.max() > 1e-3
    assert np.all(np.diff(found.values) < 0) and found.values[0] <= 5 + 1e-4


def test_rows_are_independent_and_a_row_without_examples_is_nan(table):
    found = diagnostics.top_eigenvalues(table, 2, rng=KEY, steps=SIZE).values
    np.testing.assert_allclose(found[[0, 2]], [[5, 3], [15, 9]], rtol=1e-4)
    assert np.isnan(found[1]).all()


def test_lanczos_stops_where_the_krylov_space_ends():
    low_rank = objective([symmetric(np.array([3.0, 1.0] + [0.0] * 10), 0)], lead=())
    found = diagnostics.top_eigenvalues(low_rank, 5, rng=KEY, steps=8)
    np.testing.assert_allclose(found.values[:3], [3, 1, 0], atol=1e-4)
    assert np.isnan(found.values[3:]).all() and np.nanmax(found.residuals) < 1e-3


def test_lanczos_agrees_with_matfree(single):
    start = jax.random.normal(KEY, (1, SIZE))
    ours = curvature.lanczos(single.hessian_product, start, 6)
    A = jnp.asarray(symmetric(EIGENVALUES, 0), jnp.float32)
    theirs = decomp.tridiag_sym(6, materialize=False)(lambda v: A @ v, start[0])
    np.testing.assert_allclose(ours.diagonal[0], theirs.J_small[0], atol=1e-4)
    np.testing.assert_allclose(ours.off_diagonal[0, :-1], theirs.J_small[1], atol=1e-4)


def test_the_trace_of_a_diagonal_hessian_is_exact():
    estimate = diagnostics.trace(objective([np.diag(EIGENVALUES)], lead=()), rng=KEY, probes=2)
    np.testing.assert_allclose(estimate.value, EIGENVALUES.sum(), rtol=1e-5)
    assert estimate.standard_error < 1e-5


def test_the_trace_lies_within_its_standard_errors(single):
    estimate = diagnostics.trace(single, rng=KEY, probes=60)
    A = symmetric(EIGENVALUES, 0)
    variance = 2 * (np.sum(A**2) - np.sum(np.diag(A) ** 2))
    np.testing.assert_allclose(estimate.standard_error, np.sqrt(variance / 60), rtol=0.3)
    assert abs(estimate.value - EIGENVALUES.sum()) < 4 * estimate.standard_error


def test_spectral_density_is_that_of_the_eigenvalues(single):
    found = diagnostics.spectral_density(single, rng=KEY, probes=20, steps=SIZE, width=0.4)
    exact = np.exp(-0.5 * ((found.grid[:, None] - EIGENVALUES) / 0.4) ** 2).mean(axis=1)
    exact /= 0.4 * np.sqrt(2 * np.pi)
    np.testing.assert_allclose(np.trapezoid(found.density, found.grid), 1, atol=1e-3)
    assert np.mean(np.abs(found.density - exact) < 4 * found.standard_error + 1e-4) > 0.97
    np.testing.assert_allclose(found.quadrature.weights.sum(axis=-1), 1, rtol=1e-6)


def test_quadrature_has_the_moments_that_each_probe_sees(single):
    steps, A = 4, symmetric(EIGENVALUES, 0)
    found = diagnostics.spectral_quadrature(single, rng=KEY, probes=3, steps=steps)
    for nodes, weights, key in zip(
        found.nodes, found.weights, jax.random.split(KEY, 3), strict=True
    ):
        v = np.asarray(curvature.random_signs(key, single), np.float64)[0]
        for degree in range(2 * steps):  # exact up to 2 steps - 1, and no further
            moment = v @ np.linalg.matrix_power(A, degree) @ v / SIZE
            np.testing.assert_allclose(weights @ nodes**degree, moment, rtol=1e-3, atol=1e-3)
        beyond = v @ np.linalg.matrix_power(A, 2 * steps) @ v / SIZE
        assert abs(weights @ nodes ** (2 * steps) / beyond - 1) > 1e-3


def test_means_over_the_spectrum_lie_within_their_standard_errors(single):
    found = diagnostics.spectral_quadrature(single, rng=KEY, probes=40, steps=SIZE)
    for function in (lambda t: t, np.square, lambda t: np.minimum(t, 0), lambda t: np.abs(t) > 2.5):
        estimate = found.mean(function)
        assert estimate.standard_error > 0
        assert abs(estimate.value - function(EIGENVALUES).mean()) < 4 * estimate.standard_error


def test_quadrature_ends_with_the_krylov_space_and_leaves_rows_without_examples_out(table):
    low_rank = objective([symmetric(np.array([3.0, 1.0] + [0.0] * 10), 0)], lead=())
    found = diagnostics.spectral_quadrature(low_rank, rng=KEY, probes=2, steps=8)
    assert np.isnan(found.nodes[:, 3:]).all() and not found.weights[:, 3:].any()
    np.testing.assert_allclose(found.density([3.0], 0.1).value.shape, (1,))
    np.testing.assert_allclose(found.weights.sum(axis=-1), 1, rtol=1e-6)
    rows = diagnostics.spectral_density(table, rng=KEY, probes=2, steps=3, points=5)
    assert rows.density.shape == (3, 5) and np.isnan(rows.density[1]).all()
    assert np.isfinite(rows.density[[0, 2]]).all()


def test_spectral_moments_agree_with_matfrees_quadrature(single):
    found = diagnostics.spectral_density(single, rng=KEY, probes=12, steps=6)
    ours = SIZE * found.quadrature.mean(np.square).value
    A = jnp.asarray(symmetric(EIGENVALUES, 0), jnp.float32)
    square = funm.monte_carlo_funm_sym(funm.dense_funm_sym_eigh(jnp.square), decomp.tridiag_sym(6))
    sampler = stochtrace.sampler_signs(jnp.ones(SIZE), num=12)
    theirs, error = stochtrace.estimator_monte_carlo_mean_and_sem(square, sampler)(
        lambda v: A @ v, KEY
    )
    assert abs(ours - theirs) < 6 * error + 1e-3
    np.testing.assert_allclose(ours, np.sum(EIGENVALUES**2), rtol=0.25)


def test_one_step_sharpness_is_sams():
    slope = np.random.default_rng(1).normal(size=(1, SIZE))
    A = symmetric(EIGENVALUES, 0)
    rise = diagnostics.worst_case_sharpness(objective([A], slope, lead=()), 0.3)
    shift = 0.3 * slope[0] / np.linalg.norm(slope)
    np.testing.assert_allclose(rise, slope[0] @ shift + shift @ A @ shift / 2, rtol=1e-4)


def test_many_step_sharpness_nears_the_maximum_over_the_ball():
    slope = 0.05 * np.random.default_rng(1).normal(size=SIZE)
    values, basis = np.linalg.eigh(symmetric(EIGENVALUES, 0))
    rotated = basis.T @ slope
    # s = (mu - A)^-1 b with ||s|| = 1 and mu above every eigenvalue: by bisection.
    low, high = values.max(), values.max() + np.linalg.norm(slope) + 1
    for _ in range(100):
        mu = (low + high) / 2
        s = rotated / (mu - values)
        low, high = (mu, high) if np.linalg.norm(s) > 1 else (low, mu)
    maximum = rotated @ s + values @ s**2 / 2
    quadratic_objective = objective([basis @ np.diag(values) @ basis.T], slope[None], lead=())
    one, many = (
        diagnostics.worst_case_sharpness(quadratic_objective, 1.0, steps=steps, step_size=9.0)
        for steps in (1, 40)
    )
    assert one < 0.8 * maximum and maximum * 0.99 < many <= maximum * (1 + 1e-4)


def test_average_sharpness_is_the_scaled_trace(single):
    estimate = diagnostics.average_sharpness(single, 0.5, rng=KEY, samples=60)
    expected = 0.5**2 * EIGENVALUES.sum() / (2 * SIZE)
    assert abs(estimate.value - expected) < 4 * estimate.standard_error < expected
    slope = objective([symmetric(EIGENVALUES, 0)], 100 * np.ones((1, SIZE)), lead=())
    steep = diagnostics.average_sharpness(slope, 0.5, rng=KEY, samples=60)
    np.testing.assert_allclose(steep.value, estimate.value, atol=1e-3)  # the slope cancels


def test_radius_zero_changes_nothing(table):
    np.testing.assert_array_equal(diagnostics.worst_case_sharpness(table, 0.0), [0.0, np.nan, 0.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: diagnostics.top_eigenvalues(o, 0, rng=KEY),
         "k must be a whole number >= .*, got 0"),
        (lambda o: diagnostics.top_eigenvalues(o, 3, rng=KEY, steps=2),
         "steps must be a whole number >= .*, got 2"),
        (lambda o: diagnostics.top_eigenvalues(o, 13, rng=KEY),
         "steps must be a whole number >= .*, got 12"),
        (lambda o: diagnostics.top_eigenvalues(o, 1, rng=KEY, steps=13), "dimension 12, got 13"),
        (lambda o: diagnostics.trace(o, rng=KEY, probes=1),
         "probes must be a whole number >= .*, got 1"),
        (lambda o: diagnostics.spectral_density(o, rng=KEY, probes=1),
         "probes must be a whole number >= .*, got 1"),
        (lambda o: diagnostics.spectral_density(o, rng=KEY, width=0.0), "width must be"),
        (lambda o: diagnostics.worst_case_sharpness(o, -1.0), "radius must be finite and >= 0"),
        (lambda o: diagnostics.worst_case_sharpness(o, 1.0, steps=0),
         "steps must be a whole number >= .*, got 0"),
        (lambda o: diagnostics.worst_case_sharpness(o, 1e30), "radius must keep the loss finite"),
        (lambda o: diagnostics.average_sharpness(o, 1.0, rng=KEY, samples=1),
         "samples must be a whole number >= .*, got 1"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(call, message):
    sloped = objective([symmetric(EIGENVALUES, 0)], np.ones((1, SIZE)), lead=())
    with pytest.raises(ValueError, match=message):
        call(sloped)


def constant_loss(variables, shift, batch):
    return jnp.sum(batch["image"]) + jnp.sum(shift, axis=1), jnp.full(1, float(len(batch["image"])))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches must hold at least one example, got none"),
        ([{"image": np.zeros(0, np.float32)}], "batches must hold at least one example, got none"),
        (iter([{"image": np.ones(1)}]), "batches must be a collection.*got list_iterator"),
        ([{"image": np.array([1.0, np.nan])}], "the loss over batches must be finite, got nan"),
    ],
)
def test_bad_batches_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        objective_over(constant_loss, {}, batches, rows=1, dimension=2)
