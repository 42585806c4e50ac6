"""Measurements of what perturbations do."""

from lpa_jax.diagnostics.effect import perturbation_effect

__all__ = ["perturbation_effect"]
