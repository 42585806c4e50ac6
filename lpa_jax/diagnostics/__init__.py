"""Measurements of what perturbations do."""

from lpa_jax.diagnostics.geometry import (
    Agreement,
    Observation,
    agreement,
    class_geometry,
    observe,
    perturbation_effect,
)

__all__ = [
    "Agreement",
    "Observation",
    "agreement",
    "class_geometry",
    "observe",
    "perturbation_effect",
]
