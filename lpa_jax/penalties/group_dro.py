"""GroupDRO: domains weighted by how hard they have been, so that the worst counts most."""

import jax
import jax.numpy as jnp

from lpa_jax import checks
from lpa_jax.penalties.base import Penalty, register
from lpa_jax.penalties.common import batch_mean, domain_risks


@register("group_dro")
def group_dro(num_domains: int, eta: float = 1e-2) -> Penalty:
    r"""Turns the mean loss into a weighted sum of domain risks, with weights that follow the worst.

        q_d     <- q_d exp(eta l_d) / sum_e q_e exp(eta l_e),    from q_d = 1 / D,
        penalty  = sum_d q_d l_d - mean_i loss_i,

    so that the objective, mean_i loss_i + penalty, is GroupDRO's sum_d q_d l_d with the weights
    after their update. l_d is the mean loss of domain d over the global batch; no gradient flows
    through q. A domain that is absent from the batch counts as l_d = 0, as in the published code:
    it adds nothing to the sum and its weight only shrinks as those of the others grow.

    The state is `log_q` [D], which no number of steps can underflow.

    Args:
      num_domains: D (of one its weight is 1, plain training).
        The batch names each example's domain under `domain`.
      eta: Step size of the weights, >= 0. 0 keeps them uniform, which is the mean of the domains'
        risks, not ERM, where domains differ in size.

    Raises:
      ValueError: An option out of range; from `apply`, no `domain` in the batch or (outside jit)
        one outside 0..D-1.

    Example:
      >>> state = group_dro(num_domains=4).init({}, 10)
      >>> jnp.exp(state["log_q"]).tolist()
      [0.25, 0.25, 0.25, 0.25]

    References:
      Sagawa et al., ICLR 2020 (arXiv 1911.08731), algorithm 1; eta as in DomainBed.
    """
    checks.integer("num_domains", num_domains, 1)
    checks.number("eta", eta)

    def init(shapes, num_classes):
        return {"log_q": jax.nn.log_softmax(jnp.zeros(num_domains, jnp.float32))}

    def apply(state, observed):
        risks = domain_risks(observed, num_domains, "group_dro").means
        log_q = jax.nn.log_softmax(
            state["log_q"] + eta * jax.lax.stop_gradient(risks).astype(state["log_q"].dtype)
        )
        penalty = jnp.sum(jnp.exp(log_q) * risks) - batch_mean(observed, observed.losses)
        return penalty, {"log_q": log_q}

    return Penalty("group_dro", (), init, apply)
