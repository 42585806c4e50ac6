r"""How flat an objective is: Hessian eigenvalues, trace, and sharpness within a radius.

All estimators work on every `Objective`, in weight space and in activation space, row by row, and
touch the Hessian through its products with vectors only. Results are NumPy float64 with the shape
`objective.lead` in front: nothing for the weights, [C] or [B] for activations.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lpa_jax import checks, pgd, tables
from lpa_jax.diagnostics.objective import Objective

Array = jax.Array


class Estimate(NamedTuple):
    """A mean over random samples and its standard error, s / sqrt(n) with s over n - 1.

    Example:
      >>> Estimate.over(np.array([1.0, 3.0]))
      Estimate(value=np.float64(2.0), standard_error=np.float64(1.0))
    """

    value: np.ndarray
    standard_error: np.ndarray

    @classmethod
    def over(cls, samples: np.ndarray, axis: int = 0) -> "Estimate":
        """The estimate from samples along an axis; one sample has standard error nan."""
        count = samples.shape[axis]
        if count < 2:
            return cls(samples.mean(axis), np.full_like(samples.mean(axis), np.nan))
        return cls(samples.mean(axis), samples.std(axis, ddof=1) / np.sqrt(count))


class Tridiagonal(NamedTuple):
    """Lanczos tridiagonalisations T_r of R symmetric operators.

    Attributes:
      diagonal: [R, k].
      off_diagonal: [R, k]; its last column couples to the space not reached.
      depth: [R], sizes of the leading blocks that are not zero: below k if the Krylov space of the
        starting vector ended.
    """

    diagonal: np.ndarray
    off_diagonal: np.ndarray
    depth: np.ndarray

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Eigenvalues of the T_r, ascending, with the ends of their eigenvectors.

        Returns:
          Values [R, k], nan beyond `depth`; squared first components (e_1^T s)^2, [R, k], and
          absolute last components of the leading block |e_depth^T s|, [R, k], both 0 beyond.
        """
        values = np.full(self.diagonal.shape, np.nan)
        first, last = np.zeros((2, *self.diagonal.shape))
        for row, depth in enumerate(self.depth):
            inner = self.off_diagonal[row, : depth - 1]
            block = np.diag(self.diagonal[row, :depth]) + np.diag(inner, 1) + np.diag(inner, -1)
            values[row, :depth], vectors = np.linalg.eigh(block)
            first[row, :depth], last[row, :depth] = vectors[0] ** 2, np.abs(vectors[-1])
        return values, first, last


def lanczos(product: Callable[[Array], Array], start: Array, steps: int) -> Tridiagonal:
    r"""Lanczos' tridiagonalisation of R symmetric operators at once, fully reorthogonalised.

        A q_j = beta_{j-1} q_{j-1} + alpha_j q_j + beta_j q_{j+1},    q_1 = start / ||start||.

    The host loops and keeps the vectors: memory R N `steps`. After the end of a Krylov space (beta
    below 100 units in the last place of the largest entry so far), its row is zero.

    Args:
      product: [R, N] -> [R, N], row-wise products.
      start: [R, N].
      steps: k, at most N.

    Example:
      >>> spectrum = jnp.array([[1.0, 2.0, 4.0]])
      >>> tridiagonal = lanczos(lambda v: spectrum * v, jnp.ones((1, 3)), steps=3)
      >>> tridiagonal.ritz()[0].round(4).tolist()
      [[1.0, 2.0, 4.0]]
    """
    negligible = 100 * np.finfo(start.dtype).eps
    basis = [tables.unit_rows(start)]
    diagonal, off_diagonal = np.zeros((2, start.shape[0], steps))
    depth = np.zeros(start.shape[0], int)
    alive = np.asarray(tables.row_norms(basis[0]) > 0)
    largest = np.zeros(start.shape[0])
    for j in range(steps):
        depth += alive
        residual = product(basis[j])
        diagonal[:, j] = np.asarray(tables.inner_products(basis[j], residual))
        for _ in range(2):
            for vector in basis:
                residual = _without(residual, vector)
        length = np.asarray(tables.row_norms(residual), np.float64)
        largest = np.maximum(largest, np.maximum(np.abs(diagonal[:, j]), length))
        alive = alive & (length > negligible * largest)
        off_diagonal[:, j] = np.where(alive, length, 0.0)
        basis.append(tables.unit_rows(jnp.where(jnp.asarray(alive)[:, None], residual, 0.0)))
    return Tridiagonal(diagonal, off_diagonal, depth)


class Eigenvalues(NamedTuple):
    """The algebraically largest eigenvalues that Lanczos found.

    Attributes:
      values: [*lead, k], descending; nan if the operator has fewer (see `top_eigenvalues`).
      residuals: [*lead, k], ||H v - lambda v||: an eigenvalue is within this distance.
    """

    values: np.ndarray
    residuals: np.ndarray


def top_eigenvalues(
    objective: Objective, k: int = 1, *, rng: Array, steps: int | None = None
) -> Eigenvalues:
    r"""The k algebraically largest Hessian eigenvalues, by Lanczos from a random vector.

    Ritz values approach eigenvalues from inside the spectrum. Each has its residual norm
    ||H v - lambda v|| = beta_k |s_k|, a bound on the distance to an eigenvalue. As from any single
    vector, an eigenvalue of multiplicity m is found once.

    Args:
      objective: From `weight_objective` or `activation_objective`.
      k: Number of eigenvalues, 1 to N.
      rng: Key for the starting vectors.
      steps: Lanczos steps, each one Hessian product over all batches; None is min(N, 2 k + 20).
        Memory R N `steps`.

    Raises:
      ValueError: `k` or `steps` out of range.
    """
    checks.integer("k", k, minimum=1)
    steps = min(objective.dimension, 2 * k + 20) if steps is None else steps
    checks.integer("steps", steps, minimum=k)
    if steps > objective.dimension:
        raise ValueError(f"steps must be at most the dimension {objective.dimension}, got {steps}")
    checks.key("rng", rng)
    start = jax.random.normal(rng, (objective.rows, objective.dimension), objective.dtype)
    tridiagonal = lanczos(objective.hessian_product, start, steps)
    values, _, last = tridiagonal.ritz()
    residuals = tridiagonal.off_diagonal[:, -1:] * last
    order = np.argsort(-values, axis=1)[:, :k]  # nan, where a Krylov space has ended, comes last
    return Eigenvalues(
        objective.shaped(np.take_along_axis(values, order, axis=1)),
        objective.shaped(np.take_along_axis(residuals, order, axis=1)),
    )


def trace(objective: Objective, *, rng: Array, probes: int = 32) -> Estimate:
    r"""Hutchinson's estimate of the Hessian's trace.

        tr H = E[v^T H v],    v_i = +-1 independently.

    Unbiased, with variance 2 sum_{i != j} H_ij^2 per probe: exact for a diagonal Hessian.

    Args:
      objective: From `weight_objective` or `activation_objective`.
      rng: A key.
      probes: Number of random vectors, >= 2; one Hessian product over all batches each.

    Returns:
      Estimate of shape [*lead].

    Raises:
      ValueError: `probes` out of range.

    References:
      Hutchinson, Communications in Statistics 18 (1989).
    """
    checks.integer("probes", probes, minimum=2)
    checks.key("rng", rng)
    samples = []
    for key in jax.random.split(rng, probes):
        signs = random_signs(key, objective)
        samples.append(np.asarray(tables.inner_products(signs, objective.hessian_product(signs))))
    return Estimate(*map(objective.shaped, Estimate.over(np.asarray(samples, np.float64))))


def worst_case_sharpness(
    objective: Objective, radius: float, *, steps: int = 1, step_size: float = 1.5
) -> np.ndarray:
    r"""How far the loss rises within a ball: max_{||shift|| <= radius} f(shift) - f(0).

    One step is SAM's shift radius grad f / ||grad f||. Several steps are the projected ascent with
    normalised gradients of `lpa_jax.pgd`, of which the largest loss counts. Both give a lower
    bound, which is zero if the gradient vanishes.

    Args:
      objective: From `weight_objective` or `activation_objective`.
      radius: Of the l2 ball, in units of the objective's shift, >= 0.
      steps: Ascent steps, >= 1; one gradient over all batches each.
      step_size: Path length of all steps together, in radii.

    Returns:
      [*lead], in units of the loss.

    Raises:
      ValueError: A value out of range, or a loss within the ball that is not finite.

    References:
      Foret et al., ICLR 2021 (arXiv 2010.01412), equation 2 for one step.
    """
    checks.number("radius", radius)
    checks.integer("steps", steps, minimum=1)
    options = pgd.PGDOptions(steps, step_size, "free", "l2", "full").validate()
    ones = jnp.ones(objective.rows, objective.dtype)
    shift = jnp.zeros((objective.rows, objective.dimension), objective.dtype)
    highest = objective.base
    for _ in range(steps):
        gradient = objective.gradient(shift)
        shift = pgd.ascent_step(shift, gradient, ones, radius * ones, None, options)
        highest = np.maximum(highest, _finite_value(objective, shift, radius))
    return objective.shaped(highest - objective.base)


def average_sharpness(
    objective: Objective, radius: float, *, rng: Array, samples: int = 16
) -> Estimate:
    r"""How far the loss rises on average on a sphere: E_{||shift|| = radius} f(shift) - f(0).

    To second order radius^2 tr H / (2 N). The same radius means the same distance as in
    `worst_case_sharpness`. Shifts come in pairs of opposite sign, so that the gradient, which
    averages to zero, adds no noise.

    Args:
      objective: From `weight_objective` or `activation_objective`.
      radius: Of the l2 sphere, >= 0.
      rng: A key.
      samples: Number of pairs, >= 2; two forward passes over all batches each.

    Returns:
      Estimate of shape [*lead].

    Raises:
      ValueError: A value out of range, or a loss on the sphere that is not finite.
    """
    checks.number("radius", radius)
    checks.integer("samples", samples, minimum=2)
    checks.key("rng", rng)
    rises = []
    for key in jax.random.split(rng, samples):
        normal = jax.random.normal(key, (objective.rows, objective.dimension), objective.dtype)
        shift = radius * tables.unit_rows(normal)
        pair = [_finite_value(objective, sign * shift, radius) for sign in (1.0, -1.0)]
        rises.append(np.mean(pair, axis=0) - objective.base)
    return Estimate(*map(objective.shaped, Estimate.over(np.asarray(rises))))


@jax.jit
def _without(rows: Array, unit: Array) -> Array:
    """Each row minus its component along the row of `unit`."""
    return rows - tables.inner_products(rows, unit)[:, None] * unit


def random_signs(key: Array, objective: Objective) -> Array:
    """Independent +-1 in the shape of the objective's shift, [R, N]."""
    return jax.random.rademacher(key, (objective.rows, objective.dimension), objective.dtype)


def _finite_value(objective: Objective, shift: Array, radius: float) -> np.ndarray:
    value = objective.value(shift)
    if not np.isfinite(value[objective.counts > 0]).all():
        raise ValueError(f"radius must keep the loss finite, got {radius!r} where it is not")
    return value
