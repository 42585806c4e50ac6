"""Penalties: each against its published equation in NumPy, and one contract for all of them."""

import dataclasses
import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import losses, penalties
from lpa_jax.penalties import Observed

INPUTS, WIDTH, CLASSES, DOMAINS = 3, 3, 4, 5
LAYER, STEP = "hidden", 600
# Domain 3 is absent, 4 has one example; the halves of domain 2 are on different devices, and the
# first device has an odd number of domain 0. Class 3 is absent.
DOMAIN = np.array([0, 1, 0, 0, 2, 1, 0, 1, 4, 0, 2, 1], np.int32)
LABELS = np.array([0, 1, 1, 2, 0, 0, 1, 1, 0, 2, 2, 0], np.int32)
BATCH = DOMAIN.size

OPTIONS = {
    "coral": {"num_domains": DOMAINS, "layer": LAYER, "weight": 1.5},
    "group_dro": {"num_domains": DOMAINS, "eta": 0.7},
    "irm": {"num_domains": DOMAINS, "weight": 3.0},
    "isda": {"layer": LAYER, "total_steps": 1000, "strength": 2.0},
    "spectral_decoupling": {"weight": 0.3},
    "vrex": {"num_domains": DOMAINS, "weight": 4.0},
}
OVER_DOMAINS = ("coral", "group_dro", "irm", "vrex")
every_penalty = pytest.mark.parametrize("name", OPTIONS)
over_domains = pytest.mark.parametrize("name", OVER_DOMAINS)


def make_params(dtype=np.float64):
    generator = np.random.default_rng(0)
    shapes = {"w1": (INPUTS, WIDTH), "w2": (WIDTH, CLASSES), "b": (CLASSES,)}
    return {name: generator.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def make_batch(seed=1, labels=LABELS, domain=DOMAIN):
    x = np.random.default_rng(seed).normal(size=(len(labels), INPUTS))
    # Domains differ in scale, so that no two covariances or risks agree.
    return {"x": x * (1 + 0.3 * domain[:, np.newaxis]), "label": labels, "domain": domain}


# The library's side: a tanh layer and a linear head, differentiated.


def observe(params, batch, step=STEP, axis_name=None, loss=losses.cross_entropy):
    def decode(layer, h):
        assert layer == LAYER
        return h @ params["w2"] + params["b"][None]

    features = jnp.tanh(batch["x"].astype(params["w1"].dtype) @ params["w1"])
    logits = decode(LAYER, features)
    targets = jax.nn.one_hot(batch["label"], CLASSES)
    return Observed(
        losses=loss(logits, targets),
        logits=logits,
        targets=targets,
        labels=batch["label"],
        domain=batch.get("domain"),
        features={LAYER: features},
        decode=decode,
        loss=loss,
        step=jnp.asarray(step),
        axis_name=axis_name,
    )


class Problem(NamedTuple):
    """A penalty, its first state and its compiled (value, new state), gradient."""

    penalty: penalties.Penalty
    state: object
    value_and_grad: object


def differentiate(penalty, axis_name=None):
    def value(params, state, batch, step):
        return penalty.apply(state, observe(params, batch, step, axis_name))

    return jax.value_and_grad(value, has_aux=True)


def first_state(penalty, layer_shape=(BATCH, WIDTH)):
    return penalty.init({LAYER: jax.ShapeDtypeStruct(layer_shape, jnp.float32)}, CLASSES)


@functools.cache
def problem(name, **options):
    penalty = penalties.create(name, **(OPTIONS[name] | options))
    return Problem(penalty, first_state(penalty), jax.jit(differentiate(penalty)))


def single(tree):
    """The batch or parameters as the device takes them: float32 and int32."""
    return jax.tree.map(
        lambda v: jnp.asarray(v, jnp.float32 if v.dtype.kind == "f" else None), tree
    )


def run(name, batch=None, state=None, step=STEP, dtype=jnp.float32, **options):
    """Value, new state and gradient with respect to the parameters."""
    _, first, value_and_grad = problem(name, **options)
    params = jax.tree.map(lambda v: jnp.asarray(v, dtype), make_params())
    batch = single(make_batch() if batch is None else batch)
    (value, state), gradient = value_and_grad(
        params, first if state is None else state, batch, jnp.asarray(step)
    )
    return value, state, gradient


# The references' side: NumPy in float64, one example, domain or pair at a time.


class Pass(NamedTuple):
    features: np.ndarray
    logits: np.ndarray
    losses: np.ndarray
    labels: np.ndarray
    domain: np.ndarray
    head: np.ndarray


def forward(params, batch):
    features = np.tanh(batch["x"] @ params["w1"])
    logits = features @ params["w2"] + params["b"]
    values = [entropy(z, y) for z, y in zip(logits, batch["label"], strict=True)]
    return Pass(features, logits, np.array(values), batch["label"], batch["domain"], params["w2"])


def entropy(z, label):
    return np.log(np.sum(np.exp(z - z.max()))) + z.max() - z[label]


def members(seen, at_least=1):
    indices = [np.flatnonzero(seen.domain == d) for d in range(DOMAINS)]
    return [i for i in indices if i.size >= at_least]


def reference_coral(seen, weight=1.5):
    groups = [seen.features[i] for i in members(seen, at_least=2)]
    terms = []
    for i, a in enumerate(groups):
        for b in groups[i + 1 :]:
            mean = np.mean((a.mean(axis=0) - b.mean(axis=0)) ** 2)
            covariance = np.mean((np.cov(a.T) - np.cov(b.T)) ** 2)
            terms.append(mean + covariance)
    return weight * np.mean(terms)


def reference_q(seen, q, eta=0.7):
    q = np.array(q, np.float64)
    for d in range(DOMAINS):
        if np.any(seen.domain == d):
            q[d] *= np.exp(eta * seen.losses[seen.domain == d].mean())
    return q / q.sum()


def reference_group_dro(seen, q):
    risks = [seen.losses[seen.domain == d] for d in range(DOMAINS)]
    objective = sum(w * r.mean() for w, r in zip(q, risks, strict=True) if r.size)
    return objective - seen.losses.mean()


def reference_irm(seen, weight=3.0):
    terms = []
    for i in members(seen, at_least=2):
        slopes = []
        for z, label in zip(seen.logits[i], seen.labels[i], strict=True):
            p = np.exp(z - z.max()) / np.sum(np.exp(z - z.max()))
            slopes.append(p @ z - z[label])
        terms.append(np.mean(slopes[::2]) * np.mean(slopes[1::2]))
    return weight * np.mean(terms)


def reference_vrex(seen, weight=4.0):
    return weight * np.var([seen.losses[i].mean() for i in members(seen)])


def class_covariances(features, labels):
    covariances = np.zeros((CLASSES, WIDTH, WIDTH))
    for c in set(labels):
        covariances[c] = np.cov(features[labels == c].T, bias=True)
    return covariances


def augmented_logits(seen, covariances, ratio):
    augmented = seen.logits.copy()
    for i, y in enumerate(seen.labels):
        for j in range(CLASSES):
            apart = seen.head[:, j] - seen.head[:, y]
            augmented[i, j] += ratio / 2 * apart @ covariances[y] @ apart
    return augmented


def reference_isda(seen, covariances, ratio=2.0 * STEP / 1000):
    augmented = augmented_logits(seen, covariances, ratio)
    values = [entropy(z, y) for z, y in zip(augmented, seen.labels, strict=True)]
    return np.mean(values) - seen.losses.mean()


def reference(name):
    """The penalty as a function of a pass, with what no gradient flows through held fixed."""
    base = forward(make_params(), make_batch())
    if name == "group_dro":
        q = reference_q(base, np.ones(DOMAINS) / DOMAINS)
        return functools.partial(reference_group_dro, q=q)
    if name == "isda":
        covariances = class_covariances(base.features, base.labels)
        return functools.partial(reference_isda, covariances=covariances)
    return {
        "coral": reference_coral,
        "irm": reference_irm,
        "vrex": reference_vrex,
        "spectral_decoupling": lambda seen: 0.3 * np.mean(seen.logits**2),
    }[name]


def numerical_gradient(name, eps=1e-5):
    params, penalty = make_params(), reference(name)
    gradient = {key: np.zeros_like(value) for key, value in params.items()}
    for key, value in params.items():
        for index in np.ndindex(value.shape):
            sides = []
            for sign in (1, -1):
                moved = {k: v.copy() for k, v in params.items()}
                moved[key][index] += sign * eps
                sides.append(penalty(forward(moved, make_batch())))
            gradient[key][index] = (sides[0] - sides[1]) / (2 * eps)
    return gradient


def assert_close(actual, expected, rtol=1e-4, atol=1e-5):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected
    )


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.all(np.isfinite(np.asarray(leaf, np.float64)))


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


@every_penalty
def test_bfloat16_networks_get_a_finite_penalty_in_float32(name):
    value, state, gradient = run(name, dtype=jnp.bfloat16)
    assert value.dtype == jnp.float32
    assert_finite((value, state, gradient))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, "strength" if name == "isda" else "weight") for name in OPTIONS if name != "group_dro"],
)
def test_weight_zero_is_exactly_zero_whatever_the_batch(name, option):
    batch = make_batch()
    del batch["domain"]
    penalty = penalties.create(name, **(OPTIONS[name] | {option: 0.0}))
    assert (penalty.name, penalty.layers) == (name, ())
    (value, state), gradient = differentiate(penalty)(
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
        *[(name, "num_domains", 1, "a whole number >= 2, got 1") for name in OVER_DOMAINS],
        ("vrex", "num_domains", True, "a whole number >= 2, got True"),
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
    with pytest.raises(ValueError, match="unknown penalty 'corral'; known: coral, group_dro, "):
        penalties.create("corral")
    with pytest.raises(ValueError, match="'vrex' has no option 'wait'; it has: num_domains, "):
        penalties.create("vrex", wait=1.0)


# Domains


@over_domains
@pytest.mark.parametrize(
    ("domain", "message"),
    [
        (None, r"needs batch\['domain'\], each example's domain in 0\.\.4"),
        (np.array([0, 1, 5]), r"batch\['domain'\] must lie in 0\.\.4 .*got 5 at position 2"),
        (np.array([0, -1, 0]), r"batch\['domain'\] must lie in 0\.\.4 .*got -1 at position 1"),
        (np.array([0.0, 1.0, 0.5]), r"batch\['domain'\] must hold integers, got dtype float64"),
    ],
)
def test_a_batch_with_bad_domains_is_refused_by_name(name, domain, message):
    penalty = penalties.create(name, **OPTIONS[name])
    batch = {"x": jnp.zeros((3, INPUTS)), "label": jnp.zeros(3, jnp.int32), "domain": domain}
    observed = observe(single(make_params()), batch)
    with pytest.raises(ValueError, match=message):
        penalty.apply(first_state(penalty), observed)


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
    with pytest.raises(ValueError, match=r"needs vectors \[B, F\] .*layer='hidden' has shape"):
        first_state(penalty, layer)


# By hand


def by_hand(name, domain, features=((0.0,),), losses_=(0.0,), **options):
    penalty = penalties.create(name, **(OPTIONS[name] | options))
    batch = {"x": jnp.zeros((1, INPUTS)), "label": jnp.zeros(1, jnp.int32)}
    observed = dataclasses.replace(
        observe(single(make_params()), batch),
        domain=jnp.asarray(domain),
        features={LAYER: jnp.asarray(features)},
        losses=jnp.asarray(losses_),
    )
    return penalty.apply(first_state(penalty), observed)


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


# States


def batches():
    """Three batches with other inputs and domains; class 3 and domain 3 appear in the last."""
    generator = np.random.default_rng(7)
    yield make_batch()
    yield make_batch(2, domain=generator.permutation(DOMAIN))
    yield make_batch(3, labels=np.repeat(np.array([0, 3], np.int32), 6), domain=DOMAIN // 2 + 2)


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


@pytest.mark.parametrize("diagonal", [False, True])
def test_isda_covariances_over_batches_are_those_of_all_the_data(diagonal):
    state, passes = None, []
    for batch in batches():
        before = state
        _, state, _ = run("isda", batch, state, diagonal=diagonal)
        passes.append(forward(make_params(), batch))
    features = np.concatenate([p.features for p in passes])
    labels = np.concatenate([p.labels for p in passes])
    expected = class_covariances(features, labels)
    if diagonal:
        expected = np.diagonal(expected, axis1=1, axis2=2)
    assert_close(state["covariance"], expected, atol=1e-6)
    assert_close(state["mean"], [features[labels == c].mean(axis=0) for c in range(CLASSES)])
    np.testing.assert_array_equal(state["count"], np.bincount(labels))
    for key in state:  # classes 1 and 2 are absent from the last batch
        np.testing.assert_array_equal(state[key][1:3], before[key][1:3])


def test_isda_diagonal_drops_the_covariances_between_features():
    seen = forward(make_params(), make_batch())
    covariances = class_covariances(seen.features, seen.labels) * np.eye(WIDTH)
    np.testing.assert_allclose(
        run("isda", diagonal=True)[0], reference_isda(seen, covariances), rtol=1e-4
    )


def test_isda_with_more_classes_than_examples_keeps_to_the_equation():
    labels = np.array([2, 0, 2], np.int32)
    batch = make_batch(labels=labels, domain=labels)
    seen = forward(make_params(), batch)
    value, _, gradient = run("isda", batch)
    np.testing.assert_allclose(
        value, reference_isda(seen, class_covariances(seen.features, labels)), rtol=1e-4
    )
    assert_finite(gradient)


def test_isda_strength_grows_with_the_step_and_stops_at_the_end():
    seen = forward(make_params(), make_batch())
    covariances = class_covariances(seen.features, seen.labels)
    for step, ratio in [(0, 0.0), (250, 0.5), (1000, 2.0), (3000, 2.0)]:
        expected = reference_isda(seen, covariances, ratio)
        np.testing.assert_allclose(run("isda", step=step)[0], expected, rtol=1e-4, atol=1e-6)


def test_isda_bounds_the_expected_loss_of_augmented_features():
    seen = forward(make_params(), make_batch())
    covariances = class_covariances(seen.features, seen.labels)
    generator, ratio, draws = np.random.default_rng(0), 0.5, 4000
    expected = 0.0
    for z, y in zip(seen.logits, seen.labels, strict=True):
        noise = generator.multivariate_normal(np.zeros(WIDTH), ratio * covariances[y], draws)
        expected += np.mean([entropy(z + e @ seen.head, y) for e in noise]) / BATCH
    bound = float(run("isda", step=250)[0]) + seen.losses.mean()
    assert seen.losses.mean() + 0.05 < expected < bound < expected + 0.15


def test_isda_augments_the_training_loss_whichever_it_is():
    """With a loss that is a square of cross entropy, the objective is that loss of z'."""
    penalty, state, _ = problem("isda")
    observed = observe(
        single(make_params()),
        single(make_batch()),
        loss=lambda z, t: losses.cross_entropy(z, t) ** 2,
    )
    seen = forward(make_params(), make_batch())
    z = augmented_logits(seen, class_covariances(seen.features, seen.labels), 2.0 * STEP / 1000)
    objective = penalty.apply(state, observed)[0] + jnp.mean(observed.losses)
    expected = np.mean([entropy(row, y) ** 2 for row, y in zip(z, LABELS, strict=True)])
    np.testing.assert_allclose(objective, expected, rtol=1e-4)
