"""Mixup over domains: who is mixed with whom, by how much, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lpa_jax
from experiments.methods.build import assemble
from lpa_jax import perturbations
from lpa_jax.models import MLP
from lpa_jax.perturbations import Site

DOMAINS, EACH = 4, 5
ORDER = np.random.default_rng(3).permutation(np.arange(DOMAINS * EACH) % DOMAINS)


def site(domain, seed=0):
    """One-hot activations: what is mixed shows the partner and its share of every example."""
    size = len(ORDER)
    key = jax.random.key(seed)
    return Site(
        jnp.eye(size), jnp.eye(size)[:, ::-1], jnp.arange(size), None, None, key, domain=domain
    )


def mixed(num_domains, domain, seed=0, alpha=1.0):
    mixup = perturbations.domain_mixup(alpha, num_domains=num_domains)
    applied = jax.jit(lambda: mixup.apply((), site(domain, seed))[:2])()
    return tuple(np.asarray(values, np.float64) for values in applied)


@pytest.mark.parametrize("seed", range(3))
def test_examples_are_mixed_with_those_of_the_same_rank_in_the_next_domain_of_a_cycle(seed):
    found, targets = mixed(DOMAINS, jnp.asarray(ORDER), seed)
    np.testing.assert_allclose(targets, found[:, ::-1], atol=1e-7)
    rank = np.array([np.sum(ORDER[:i] == d) for i, d in enumerate(ORDER)])
    following, shares = {}, {}
    for i, row in enumerate(found):
        own, others = row[i], np.delete(row, i)
        partner = int(np.argmax(np.where(np.arange(len(row)) == i, -1, row)))
        assert own + others.max() == pytest.approx(1, abs=1e-6) and np.sum(others > 1e-7) <= 1
        assert rank[partner] == rank[i]
        assert following.setdefault(ORDER[i], ORDER[partner]) == ORDER[partner]
        assert shares.setdefault(ORDER[i], row[partner]) == pytest.approx(row[partner], abs=1e-6)
    walked = [0]
    while following[walked[-1]] != 0:
        walked.append(int(following[walked[-1]]))
    assert sorted(walked) == list(range(DOMAINS)), "one cycle through all domains"
    assert len({round(share, 4) for share in shares.values()}) == DOMAINS, "a share a pair"


def test_the_cycle_is_drawn_anew():
    assert len({mixed(DOMAINS, jnp.asarray(ORDER), seed)[0].tobytes() for seed in range(6)}) == 6


def test_one_domain_alone_and_alpha_zero_change_nothing():
    for num_domains, alpha in ((1, 1.0), (DOMAINS, 0.0)):
        domain = jnp.asarray(ORDER % num_domains)
        found, targets = mixed(num_domains, domain, alpha=alpha)
        np.testing.assert_array_equal(found, np.eye(len(ORDER)))
        np.testing.assert_array_equal(targets, np.eye(len(ORDER))[:, ::-1])


def test_batches_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match=r"domain_mixup needs batch\['domain'\]"):
        mixed(DOMAINS, None)
    with pytest.raises(ValueError, match="equally many examples of 3 domains on a device, got 20"):
        mixed(3, jnp.asarray(ORDER % 3))
    with pytest.raises(ValueError, match="num_domains must be a whole number >= 1, got 0"):
        perturbations.domain_mixup(num_domains=0)


def test_mixup_is_that_over_domains_where_the_task_has_domains():
    def built(**kwargs):
        options = {"mixup.alpha": 0.4}
        parts = assemble("mixup", options, layers=("input", "logits"), layer=None, counts=[1],
                         **kwargs)  # fmt: skip
        return parts.perturbations["input"].name

    assert (built(), built(num_domains=3)) == ("manifold_mixup", "domain_mixup")


def test_a_step_hands_the_batchs_domains_on():
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(8, 3)).astype(np.float32), "label": np.arange(8) % 2,
             "domain": np.arange(8) % 4}  # fmt: skip
    here = {"input": perturbations.domain_mixup(num_domains=4)}
    state = lpa_jax.TrainState.create(
        MLP(num_classes=2, hidden=(4,)), optax.sgd(0.1), jax.random.key(0), batch, here
    )
    losses = []
    for used in (here, {}):
        step = jax.jit(functools.partial(lpa_jax.lpa_step, perturbations=used))
        losses.append(float(step(state, batch)[1]["loss"][0]))
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    del batch["domain"]
    with pytest.raises(ValueError, match=r"batch\['domain'\]"):
        lpa_jax.lpa_step(state, batch, perturbations=here)
