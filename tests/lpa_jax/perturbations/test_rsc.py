"""RSC against DomainBed's procedure written out in NumPy, one example at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import losses, perturbations
from lpa_jax.perturbations import Site
from tests.helpers import reference

BATCH, FEATURES, CLASSES = 12, 9, 4


@pytest.fixture(scope="module")
def problem():
    generator = np.random.default_rng(0)
    network = reference.random_network(generator, (FEATURES,), CLASSES)
    h = generator.normal(size=(BATCH, FEATURES)).astype(np.float32)
    return network, h, generator.integers(0, CLASSES, BATCH).astype(np.int32)


def perturbed(perturbation, decode, h, labels):
    """h~ and the gradient of sum(h~^2) / 2 with respect to h."""
    return jax.jit(functools.partial(on_device, perturbation, decode))(h, labels)


def on_device(perturbation, decode, h, labels, axis_name=None):
    targets, rng = jax.nn.one_hot(labels, CLASSES), jax.random.key(0, impl="rbg")

    def half_square(h):
        site = Site(h, targets, labels, decode, losses.cross_entropy, rng, axis_name)
        out = perturbation.apply((), site).activation
        return 0.5 * jnp.sum(out**2), out

    gradient, out = jax.grad(half_square, has_aux=True)(h)
    return out, gradient


def decoder(network):
    return lambda h: reference.jax_logits(network, h)


def own_gradient(network, h, label):
    """Gradient of one example's own logit with respect to its features."""
    activity = np.tanh(h @ network.w1 + network.b1)
    return network.w1 @ ((1 - activity**2) * network.w2[:, label])


def muted_by_domainbed(network, h, labels, drop_f, drop_b):
    masks, changes = [], []
    for row, label in zip(h.astype(np.float64), labels, strict=True):
        gradient = own_gradient(network, row, label)
        mask = gradient < np.percentile(gradient, (1 - drop_f) * 100)
        before, after = (
            reference.softmax(reference.logits(network, f))[label] for f in (row, row * mask)
        )
        masks.append(mask)
        changes.append(before - after)
    exempt = np.array(changes) < np.percentile(changes, (1 - drop_b) * 100)
    return h * (np.array(masks) | exempt[:, np.newaxis])


@pytest.mark.parametrize(("drop_f", "drop_b"), [(1 / 3, 1 / 3), (0.2, 0.75)])
def test_rsc_mutes_what_domainbed_mutes(problem, drop_f, drop_b):
    network, h, labels = problem
    out, _ = perturbed(perturbations.rsc(drop_f, drop_b), decoder(network), h, labels)
    expected = muted_by_domainbed(network, h, labels, drop_f, drop_b)
    assert 0 < np.sum(expected == 0) < expected.size
    np.testing.assert_array_equal(out, expected)


def test_a_third_of_the_features_is_muted_in_a_third_of_the_examples():
    # Own-class gradients of a linear head are its weights: 4, 3, 2, 1 for class 0. Of four values,
    # the two largest reach the 2/3 quantile, which is the second largest itself.
    head = jnp.array([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    h = jnp.array([[0.1, 0.1, 1.0, 1.0], [0.0, 0.1, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [1.0] * 4])

    def decode(h):
        return jnp.pad(h @ head, ((0, 0), (0, CLASSES - 2)))

    out, _ = perturbed(perturbations.rsc(), decode, h, jnp.zeros(4, jnp.int32))
    # The first and the last example lose most confidence: 0.7 and 7 of their own logit.
    np.testing.assert_allclose(out, np.array(h) * [[0, 0, 1, 1], [1] * 4, [1] * 4, [0, 0, 1, 1]])


def test_no_gradient_flows_through_the_masks(problem):
    network, h, labels = problem
    out, gradient = perturbed(perturbations.rsc(), decoder(network), h, labels)
    np.testing.assert_array_equal(gradient, out)  # d/dh of sum((m h)^2) / 2 with m constant


def test_examples_compete_over_the_whole_mapped_batch(problem):
    network, h, labels = problem
    whole, _ = perturbed(perturbations.rsc(), decoder(network), h, labels)
    # Sorted by whether they are muted: on one device alone, other examples would be.
    order = np.argsort(np.any(np.asarray(whole) != h, axis=1), kind="stable")
    device = functools.partial(on_device, perturbations.rsc(), decoder(network), axis_name="batch")
    shards, _ = jax.jit(jax.vmap(device, axis_name="batch"))(
        h[order].reshape(2, -1, FEATURES), labels[order].reshape(2, -1)
    )
    np.testing.assert_array_equal(np.asarray(shards).reshape(h.shape), np.asarray(whole)[order])
    assert np.array_equal(shards[0], h[order[: BATCH // 2]]), "all muted ones on one device"


@pytest.mark.parametrize("option", ["drop_f", "drop_b"])
def test_shares_outside_the_unit_interval_are_refused(option):
    with pytest.raises(ValueError, match=rf"{option} must be in \[0, 1\], got 1.5"):
        perturbations.rsc(**{option: 1.5})
