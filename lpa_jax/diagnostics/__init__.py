"""Measurements of what perturbations do, and of the networks that they leave behind.

Pure functions of a `Network` and its variables, whoever trained them: what a perturbation does
(`geometry`), how it grows on its way up (`amplification`), how flat a network is in its weights and
activations (`objective`, `curvature`, `spectrum`, `landscape`), how alike two networks are
(`similarity`), and how far one can be trusted (`calibration`, `corruptions`).
"""

from lpa_jax.diagnostics import corruptions
from lpa_jax.diagnostics.activation_flatness import (
    ActivationFlatness,
    activation_flatness,
    activation_objective,
)
from lpa_jax.diagnostics.amplification import (
    LocalBound,
    gains,
    layers_above,
    local_bound,
    random_directions,
)
from lpa_jax.diagnostics.calibration import (
    Reliability,
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
)
from lpa_jax.diagnostics.curvature import (
    Eigenvalues,
    Estimate,
    average_sharpness,
    top_eigenvalues,
    trace,
    worst_case_sharpness,
)
from lpa_jax.diagnostics.flatness import filter_norms, weight_objective
from lpa_jax.diagnostics.geometry import (
    Agreement,
    Observation,
    agreement,
    class_geometry,
    observe,
    perturbation_effect,
)
from lpa_jax.diagnostics.landscape import filter_normalized_directions, loss_slice
from lpa_jax.diagnostics.objective import Objective, objective_over
from lpa_jax.diagnostics.radius import suggest_radius
from lpa_jax.diagnostics.similarity import error_consistency, linear_cka, prediction_agreement
from lpa_jax.diagnostics.spectrum import (
    SpectralDensity,
    SpectralQuadrature,
    spectral_density,
    spectral_quadrature,
)

__all__ = [
    "ActivationFlatness", "Agreement", "Eigenvalues", "Estimate", "LocalBound", "Objective",
    "Observation", "Reliability", "SpectralDensity", "SpectralQuadrature", "activation_flatness",
    "activation_objective", "agreement", "average_sharpness", "class_geometry", "corruptions",
    "error_consistency", "expected_calibration_error", "filter_normalized_directions",
    "filter_norms", "gains", "layers_above", "linear_cka", "local_bound", "loss_slice",
    "negative_log_likelihood", "objective_over", "observe", "perturbation_effect",
    "prediction_agreement", "random_directions", "reliability", "spectral_density",
    "spectral_quadrature", "suggest_radius", "top_eigenvalues", "trace", "weight_objective",
    "worst_case_sharpness",
]  # fmt: skip
