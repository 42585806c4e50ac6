"""A tiny penalized network, and every penalty's published equation in NumPy float64.

The references walk over examples, domains and pairs one at a time and share no code with the
library.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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


def run(name, batch=None, state=None, step=STEP, **options):
    """Value, new state and gradient with respect to the parameters."""
    _, first, value_and_grad = problem(name, **options)
    params = single(make_params())
    batch = single(make_batch() if batch is None else batch)
    (value, state), gradient = value_and_grad(
        params, first if state is None else state, batch, jnp.asarray(step)
    )
    return value, state, gradient


def by_hand(name, domain, features=((0.0,),), losses_=(0.0,), **options):
    penalty = penalties.create(name, **(OPTIONS[name] | options))
    batch = {"x": jnp.zeros((1, INPUTS)), "label": jnp.zeros(1, jnp.int32)}
    observed = dataclasses.replace(
        observe(single(make_params()), batch),
        domain=jnp.asarray(domain),
        features={LAYER: jnp.asarray(features)},
        losses=jnp.asarray(losses_),
    )
    return jax.jit(lambda: penalty.apply(first_state(penalty), observed))()


def batches():
    """Three batches with other inputs and domains; class 3 and domain 3 appear in the last."""
    generator = np.random.default_rng(7)
    yield make_batch()
    yield make_batch(2, domain=generator.permutation(DOMAIN))
    yield make_batch(3, labels=np.repeat(np.array([0, 3], np.int32), 6), domain=DOMAIN // 2 + 2)


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
