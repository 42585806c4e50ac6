"""Penalties: each against its published equation, and one contract for all of them."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import penalties
from tests.helpers.penalty_reference import (
    BATCH,
    DOMAINS,
    INPUTS,
    OPTIONS,
    STEP,
    assert_close,
    assert_finite,
    batches,
    by_hand,
    differentiate,
    first_state,
    forward,
    make_batch,
    make_params,
    numerical_gradient,
    observe,
    problem,
    reference,
    reference_group_dro,
    reference_q,
    run,
    single,
)

OVER_DOMAINS = ("coral", "group_dro", "irm", "vrex")
every_penalty = pytest.mark.parametrize("name", OPTIONS)
over_domains = pytest.mark.parametrize("name", OVER_DOMAINS)


# One contract for all


def test_every_registered_penalty_is_in_this_suite():
    assert set(penalties.names()) == set(OPTIONS)


@every_penalty
def test_value_is_that_of_the_published_equation(name):
    expected = reference(name)(forward(make_params(), make_batch()))
    assert abs(expected) > 0.01
    np.testing.assert_allclose(run(name)[0], expected, rtol=1e-4)


@every_penalty
def test_gradient_is_that_of_the_published_equation(name):
    expected = numerical_gradient(name)
    assert all(np.max(np.abs(g)) > 1e-3 for g in expected.values() if name != "coral")
    assert_close(run(name)[2], expected)


@every_penalty
def test_two_shards_give_the_value_gradient_and_state_of_the_whole_batch(name):
    """vmap with an axis name stands for two devices, each with its own mix of domains."""
    penalty, state, _ = problem(name)
    shards = {key: v.reshape(2, -1, *v.shape[1:]) for key, v in single(make_batch()).items()}

    def device(params, shard):
        (value, new), gradient = differentiate(penalty, "batch")(params, state, shard, STEP)
        return value, new, jax.lax.pmean(gradient, "batch")

    over_devices = jax.jit(jax.vmap(device, in_axes=(None, 0), axis_name="batch"))
    on_each = over_devices(single(make_params()), shards)
    for i in range(2):
        assert_close(jax.tree.map(lambda v, i=i: v[i], on_each), run(name), rtol=2e-5, atol=1e-6)


@every_penalty
def test_second_step_neither_recompiles_nor_changes_the_state_structure(name):
    _, state, value_and_grad = problem(name)
    _, after, _ = run(name)
    compiled = value_and_grad._cache_size()
    _, later, _ = run(name, make_batch(seed=2), after, step=STEP + 1)
    assert value_and_grad._cache_size() == compiled
    for new in (after, later):
        assert jax.tree.map(lambda v: (v.shape, v.dtype), new) == jax.tree.map(
            lambda v: (v.shape, v.dtype), state
        )


def test_bfloat16_networks_get_finite_penalties_in_float32():
    params = jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), make_params())

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def evaluate(params, batch):
        observed = observe(params, batch)
        applied = {n: problem(n).penalty.apply(problem(n).state, observed) for n in OPTIONS}
        return sum(value for value, _ in applied.values()), applied

    gradient, applied = evaluate(params, single(make_batch()))
    assert_finite((gradient, applied))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(applied))


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, "strength" if name == "isda" else "weight") for name in OPTIONS if name != "group_dro"],
)
def test_weight_zero_is_exactly_zero_whatever_the_batch(name, option):
    batch = make_batch()
    del batch["domain"]
    penalty = penalties.create(name, **(OPTIONS[name] | {option: 0.0}))
    assert (penalty.name, penalty.layers) == (name, ())
    (value, state), gradient = jax.jit(differentiate(penalty))(
        single(make_params()), first_state(penalty), single(batch), STEP
    )
    assert value == 0
    assert state == ()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("coral", {"weight": 1.0}),
        ("group_dro", {"eta": 0.01}),
        ("irm", {"weight": 100.0, "anneal_steps": 500}),
        ("isda", {"strength": 0.5, "diagonal": False}),
        ("spectral_decoupling", {"weight": 0.1}),
        ("vrex", {"weight": 10.0, "anneal_steps": 500}),
    ],
)
def test_every_penalty_is_created_by_name_with_the_published_defaults(name, defaults):
    parameters = inspect.signature(getattr(penalties, name)).parameters
    given = {p.name: p.default for p in parameters.values() if p.default is not p.empty}
    assert given == defaults
    required = {k: v for k, v in OPTIONS[name].items() if k not in defaults}
    assert penalties.create(name, **required).name == name


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        *[(name, "num_domains", 0, "a whole number >= 1, got 0") for name in OVER_DOMAINS],
        ("vrex", "num_domains", True, "a whole number >= 1, got True"),
        *[(name, "weight", -1.0, "finite and >= 0, got -1.0") for name in ("coral", "irm", "vrex")],
        ("spectral_decoupling", "weight", np.inf, "finite and >= 0, got inf"),
        ("group_dro", "eta", np.nan, "finite and >= 0, got nan"),
        ("isda", "strength", -0.5, "finite and >= 0, got -0.5"),
        ("isda", "total_steps", 0, "a whole number >= 1, got 0"),
        ("irm", "anneal_steps", -1, "a whole number >= 0, got -1"),
        ("vrex", "anneal_steps", 0.5, "a whole number >= 0, got 0.5"),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, option, value, message):
    with pytest.raises(ValueError, match=f"^{option} must be {message}$"):
        penalties.create(name, **(OPTIONS[name] | {option: value}))


def test_unknown_names_and_options_are_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"penalty must be one of coral, group_dro, .*got 'corral'"
    ):
        penalties.create("corral")
    with pytest.raises(ValueError, match=r"'vrex' must be one of num_domains, .*got 'wait'"):
        penalties.create("vrex", wait=1.0)


# Domains


@over_domains
@pytest.mark.parametrize(
    ("domain", "message"),
    [
        (None, r"batch\['domain'\] must be each example's domain in 0\.\.4 .* got None"),
        (np.array([0, 1, 5]), r"batch\['domain'\] must be in 0\.\.4, got 5 at position 2"),
        (np.array([0, -1, 0]), r"batch\['domain'\] must be in 0\.\.4, got -1 at position 1"),
        (np.array([0.0, 1.0, 0.5]), r"batch\['domain'\] must be integers, got dtype float64"),
    ],
)  # fmt: skip
def test_a_batch_with_bad_domains_is_refused_by_name(name, domain, message):
    penalty = penalties.create(name, **OPTIONS[name])
    batch = {"x": jnp.zeros((3, INPUTS)), "label": jnp.zeros(3, jnp.int32), "domain": domain}
    observed = observe(single(make_params()), batch)
    with pytest.raises(ValueError, match=message):
        penalty.apply(first_state(penalty), observed)


@over_domains
def test_a_domain_out_of_range_that_jit_cannot_refuse_gives_nan(name):
    batch = make_batch()
    for wrong in (-1, 5):
        assert np.isnan(run(name, batch | {"domain": np.append(batch["domain"][1:], wrong)})[0])


@pytest.mark.parametrize("name", ["coral", "irm", "vrex"])
@pytest.mark.parametrize("domain", [np.full(BATCH, 2), np.arange(BATCH) // (BATCH // 2) * 4])
def test_absent_domains_contribute_nothing(name, domain):
    """The reference walks over the domains there are: one, then two of five."""
    batch = make_batch(domain=domain.astype(np.int32))
    value, _, gradient = run(name, batch)
    assert_finite(gradient)
    seen = forward(make_params(), batch)
    alone = np.ptp(domain) == 0 and name != "irm"
    np.testing.assert_allclose(value, 0.0 if alone else reference(name)(seen), rtol=1e-4, atol=1e-6)
    if alone:
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", ["coral", "irm"])
def test_domains_too_small_for_a_statistic_contribute_nothing(name):
    """One example each has neither a covariance nor two halves."""
    rows = np.arange(3)
    batch = make_batch(labels=rows.astype(np.int32), domain=rows.astype(np.int32))
    value, _, gradient = run(name, batch)
    assert value == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", ["irm", "vrex"])
def test_the_weight_is_one_until_annealing_ends(name):
    values = [float(run(name, step=step)[0]) for step in (0, 499, 500, 10_000)]
    weight = OPTIONS[name]["weight"]
    np.testing.assert_allclose(values, np.array([1, 1, weight, weight]) * values[0], rtol=1e-6)


@pytest.mark.parametrize(("name", "layer"), [("coral", (8, 4, 4, 3)), ("isda", (8,))])
def test_features_that_are_not_vectors_are_refused(name, layer):
    penalty = penalties.create(name, **OPTIONS[name])
    with pytest.raises(
        ValueError,
        match=rf"layer 'hidden' must be vectors \[B, F\] for the penalty '{name}', got shape \(8",
    ):
        first_state(penalty, layer)


# By hand


def test_coral_by_hand():
    # Means 1 and 3 differ by 2, variances 2 and 8 by 6.
    value, _ = by_hand("coral", [0, 1, 0, 1], [[0.0], [1.0], [2.0], [5.0]], weight=1.0)
    np.testing.assert_allclose(value, 2**2 + 6**2, rtol=1e-6)


def test_vrex_by_hand():
    # Risks 1, 2 and 6: mean 3, variance (4 + 1 + 9) / 3.
    value, _ = by_hand("vrex", [0, 0, 1, 4], losses_=[0.5, 1.5, 2.0, 6.0], weight=3.0)
    np.testing.assert_allclose(value, 14.0, rtol=1e-6)


def test_group_dro_by_hand():
    # Risks log 2 and log 4 with eta = 1 multiply the weights by 2 and 4, absent ones by 1.
    log2 = np.log(2)
    value, state = by_hand(
        "group_dro", [0, 0, 1], losses_=[0.5 * log2, 1.5 * log2, 2 * log2], eta=1.0
    )
    np.testing.assert_allclose(np.exp(state["log_q"]), np.array([2, 4, 1, 1, 1]) / 9, rtol=1e-6)
    np.testing.assert_allclose(value, (2 / 9 + 2 * 4 / 9 - 4 / 3) * log2, rtol=1e-5)


def seen_by_hand(**fields):
    """What a penalty observes of a pass, with some of it set by hand."""
    batch = {"x": jnp.zeros((1, INPUTS)), "label": jnp.zeros(1, jnp.int32)}
    observed = observe(single(make_params()), batch)
    return dataclasses.replace(observed, **fields)


def test_irm_by_hand():
    # Logits (log 3, 0), probabilities (3, 1) / 4. The slope p.z - z_y is -1/4 log 3 for class 0 and
    # 3/4 log 3 for class 1; the halves of domain 0 have one class each, those of domain 2 the same.
    labels = jnp.array([0, 1, 0, 0])
    observed = seen_by_hand(
        logits=jnp.log(jnp.array([[3.0, 1.0]] * 4)),
        targets=jax.nn.one_hot(labels, 2),
        domain=jnp.array([0, 0, 2, 2]),
    )
    penalty = penalties.irm(DOMAINS, weight=8.0, anneal_steps=0)
    value, _ = jax.jit(lambda: penalty.apply((), observed))()
    squares = (-1 / 4 * 3 / 4, 1 / 4 * 1 / 4)
    np.testing.assert_allclose(value, 8 * np.mean(squares) * np.log(3) ** 2, rtol=1e-6)


def test_spectral_decoupling_by_hand():
    observed = seen_by_hand(logits=jnp.array([[1.0, 2.0], [3.0, -4.0]]))
    value, _ = penalties.spectral_decoupling(weight=0.5).apply((), observed)
    np.testing.assert_allclose(value, 0.5 * (1 + 4 + 9 + 16) / 4)


def test_isda_by_hand():
    # Class 0 has the features 0 and 2, variance 1, class 1 one feature only, variance 0. With head
    # (1, 3) and lambda = 2 * 250 / 1000 the logit of class 1 rises by 1/4 (3 - 1)^2 for class 0.
    labels = jnp.array([0, 1, 0])
    observed = seen_by_hand(
        logits=jnp.zeros((3, 2)),
        losses=jnp.full(3, np.log(2)),
        targets=jax.nn.one_hot(labels, 2),
        labels=labels,
        features={"pool": jnp.array([[0.0], [5.0], [2.0]])},
        decode=lambda layer, h: h @ jnp.array([[1.0, 3.0]]) + jnp.array([[7.0, -2.0]]),
        step=jnp.asarray(250),
    )
    penalty = penalties.isda("pool", total_steps=1000, strength=2.0)
    state = penalty.init({"pool": jax.ShapeDtypeStruct((3, 1), jnp.float32)}, 2)
    value, _ = jax.jit(lambda: penalty.apply(state, observed))()
    expected = (2 * np.log(1 + np.e) + np.log(2)) / 3 - np.log(2)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


# Weights of the domains


def test_group_dro_weights_multiply_over_batches():
    state, q = None, np.ones(DOMAINS) / DOMAINS
    for batch in batches():
        value, state, _ = run("group_dro", batch, state)
        seen = forward(make_params(), batch)
        q = reference_q(seen, q)
        np.testing.assert_allclose(np.exp(state["log_q"]), q, rtol=1e-4)
        np.testing.assert_allclose(value, reference_group_dro(seen, q), rtol=1e-3, atol=1e-5)


def test_group_dro_weights_survive_losses_that_would_underflow_them():
    value, state = by_hand("group_dro", [0, 1], losses_=[1000.0, 0.0], eta=10.0)
    assert_finite((value, state))
    np.testing.assert_allclose(value, 1000.0 - 500.0)


def test_of_one_domain_there_is_nothing_to_compare():
    alone = make_batch(domain=np.zeros_like(make_batch()["domain"]))
    for name in ("coral", "group_dro", "vrex"):
        assert run(name, alone, num_domains=1)[0] == pytest.approx(0.0, abs=1e-6), name
    assert abs(run("irm", alone, num_domains=1)[0]) > 0.01
