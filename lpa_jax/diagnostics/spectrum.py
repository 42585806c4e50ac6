"""The spectrum of an objective's Hessian: the density of its eigenvalues, and means over them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from lpa_jax import checks
from lpa_jax.diagnostics.curvature import Estimate, lanczos, random_signs
from lpa_jax.diagnostics.objective import Objective

Array = jax.Array


class SpectralQuadrature(NamedTuple):
    r"""Stochastic Lanczos quadrature of a spectrum: a few nodes, each with a weight.

        (1/N) sum_k g(lambda_k) ~ (1/n) sum_p sum_j w_pj g(theta_pj)

    for any g, with Ritz values theta_pj and w_pj = (e_1^T s_pj)^2 of Lanczos from random sign
    vectors p = 1..n. Exact in expectation for polynomials g up to degree 2 steps - 1.

    Attributes:
      nodes: Theta, [*lead, n, steps]; nan beyond the end of a Krylov space.
      weights: w, [*lead, n, steps]; they sum to 1 for every probe, and are 0 at nodes of nan.

    Example:
      >>> found = SpectralQuadrature(np.array([[0.0, 4.0], [1.0, np.nan]]),
      ...                            np.array([[0.5, 0.5], [1.0, 0.0]]))
      >>> found.mean(np.square).value.item()
      4.5
      >>> found.density([1.0], width=0.01).value.round(2).tolist()
      [19.95]
    """

    nodes: np.ndarray
    weights: np.ndarray

    def mean(self, function: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """The mean of a function over all eigenvalues, [*lead], with its error over probes."""
        return Estimate.over(self._sums(function(self._known())), axis=-1)

    def density(self, grid: np.ndarray, width: float) -> Estimate:
        r"""phi(t) = (1/N) sum_k N(t; lambda_k, width^2), which integrates to 1.

        Args:
          grid: t, [G].
          width: Standard deviation of the Gaussians, in units of the nodes, > 0.

        Returns:
          Density and standard error over probes, [*lead, G].

        Raises:
          ValueError: A width out of range.
        """
        checks.number("width", width, np.finfo(float).tiny)
        grid = np.asarray(grid, np.float64)
        distance = (grid - self._known()[..., None]) / width
        bell = np.exp(-0.5 * distance**2) / (width * np.sqrt(2 * np.pi))
        return Estimate.over(np.sum(self.weights[..., None] * bell, axis=-2), axis=-2)

    def _known(self) -> np.ndarray:
        return np.nan_to_num(self.nodes)  # nan has weight 0

    def _sums(self, values: np.ndarray) -> np.ndarray:
        return np.sum(self.weights * values, axis=-1)


def spectral_quadrature(
    objective: Objective, *, rng: Array, probes: int = 8, steps: int = 40
) -> SpectralQuadrature:
    """Lanczos from random sign vectors.

    Args:
      objective: From `weight_objective` or `activation_objective`.
      rng: A key.
      probes: n, >= 2.
      steps: Lanczos steps per probe, each one Hessian product over all batches, >= 1; at most N
        are made. Memory R N `steps`.

    Raises:
      ValueError: A value out of range.

    References:
      Golub and Meurant, Matrices, Moments and Quadrature (1994); for Hessians Ghorbani et
      al., ICML 2019 (arXiv 1901.10159).
    """
    checks.integer("probes", probes, minimum=2)
    steps = min(checks.integer("steps", steps, minimum=1), objective.dimension)
    checks.key("rng", rng)
    found = []
    for key in jax.random.split(rng, probes):
        start = random_signs(key, objective)
        found.append(lanczos(objective.hessian_product, start, steps).ritz()[:2])
    nodes, weights = (np.stack(part, axis=1) for part in zip(*found, strict=True))
    return SpectralQuadrature(objective.shaped(nodes), objective.shaped(weights))


class SpectralDensity(NamedTuple):
    """Density of the Hessian's eigenvalues, smoothed by Gaussians.

    Attributes:
      grid: Eigenvalues t, [G].
      density: phi(t), [*lead, G]; integrates to 1.
      standard_error: Of the density over probes, [*lead, G].
      quadrature: The nodes and weights behind it.
    """

    grid: np.ndarray
    density: np.ndarray
    standard_error: np.ndarray
    quadrature: SpectralQuadrature


def spectral_density(
    objective: Objective,
    *,
    rng: Array,
    probes: int = 8,
    steps: int = 40,
    points: int = 512,
    width: float | None = None,
) -> SpectralDensity:
    """`spectral_quadrature`, smoothed on a grid that covers all of it.

    Args:
      objective: From `weight_objective` or `activation_objective`.
      rng: A key.
      probes: n, >= 2.
      steps: Lanczos steps per probe, >= 1; at most N are made.
      points: G, >= 2, evenly over the Ritz values and five widths on both sides.
      width: Of the Gaussians, in units of the eigenvalues; None is 1% of the range of Ritz values.

    Raises:
      ValueError: A value out of range.
    """
    checks.integer("points", points, minimum=2)
    quadrature = spectral_quadrature(objective, rng=rng, probes=probes, steps=steps)
    low, high = np.nanmin(quadrature.nodes), np.nanmax(quadrature.nodes)
    if width is None:
        width = 0.01 * (high - low) or 1e-3
    grid = np.linspace(low - 5 * width, high + 5 * width, points)
    return SpectralDensity(grid, *quadrature.density(grid, width), quadrature)
