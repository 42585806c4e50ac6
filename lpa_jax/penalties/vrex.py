"""V-REx: the variance of the domains' risks, so that no domain improves at another's cost."""

from lpa_jax import checks
from lpa_jax.penalties.base import Penalty, register
from lpa_jax.penalties.common import annealed, domain_risks, mean_where, stateless, zero


@register("vrex")
def vrex(num_domains: int, weight: float = 10.0, anneal_steps: int = 500) -> Penalty:
    r"""Variance of the risks over the domains that are present in the batch.

        penalty = beta mean_d (l_d - mean_e l_e)^2,    beta = weight from step `anneal_steps` on,
                                                       1 before,

    with l_d the mean loss of domain d over the global batch. With fewer than two domains present it
    is zero.

    Args:
      num_domains: D (of one there is nothing to compare, the penalty is 0).
        The batch names each example's domain under `domain`.
      weight: Beta after annealing, >= 0. 0 is no penalty, before annealing either.
      anneal_steps: Steps with beta = 1, >= 0. DomainBed also resets Adam's moments at the end of
        them; the step does not. To do so, call
        `state.replace(opt_state=state.optimizer.init(state.params))` before step `anneal_steps`.

    Raises:
      ValueError: An option out of range; from `apply`, no `domain` in the batch or (outside jit)
        one outside 0..D-1.

    Example:
      >>> vrex(num_domains=3).name
      'vrex'

    References:
      Krueger et al., ICML 2021 (arXiv 2003.00688), equation of V-REx; weight, annealing and
      the variance over D, not D - 1, as in DomainBed.
    """
    checks.integer("num_domains", num_domains, 1)
    checks.number("weight", weight)
    checks.integer("anneal_steps", anneal_steps, 0)
    if checks.vanishes(weight):
        return zero("vrex")

    def value(observed):
        risks, present = domain_risks(observed, num_domains, "vrex")
        variance = mean_where(present, (risks - mean_where(present, risks)) ** 2)
        return annealed(weight, anneal_steps, observed.step) * variance

    return stateless("vrex", value)
