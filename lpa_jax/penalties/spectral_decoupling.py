"""Spectral decoupling: small logits, so that one easy feature does not keep others unlearned."""

from lpa_jax import checks, tables
from lpa_jax.penalties.base import Penalty, register
from lpa_jax.penalties.common import batch_mean, stateless, zero


@register("spectral_decoupling")
def spectral_decoupling(weight: float = 0.1) -> Penalty:
    r"""Mean square of the logits (SD).

        penalty = weight mean_{i, c} z_ic^2

    over the examples of the global batch and the classes.

    Args:
      weight: DomainBed's sd_reg, >= 0. 0 is no penalty. The paper writes lambda / 2 times the
        squared norm of an example's logits: weight = lambda C / 2.

    Raises:
      ValueError: `weight` out of range.

    Example:
      >>> spectral_decoupling().name
      'spectral_decoupling'

    References:
      Pezeshki et al., NeurIPS 2021 (arXiv 2011.09468), with the mean over classes and the
      weight of DomainBed.
    """
    checks.number("weight", weight)
    if checks.vanishes(weight):
        return zero("spectral_decoupling")

    def value(observed):
        logits = tables.at_least_float32(observed.logits)
        return weight * batch_mean(observed, logits**2)

    return stateless("spectral_decoupling", value)
