"""The baseline perturbations, each against its published formula written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import losses, perturbations
from lpa_jax.perturbations import Site
from lpa_jax.perturbations.manifold_mixup import partner_share


def key(seed=0):
    return jax.random.key(seed, impl="rbg")  # compiles faster than the default on a CPU


def perturbed(perturbation, activation, *, gradient_of=None, axis_name=None, **fields):
    """The perturbed activation h~; no method here keeps a state.

    With weights `gradient_of`, also the gradient of sum(weights * h~) with respect to h.
    """
    size = activation.shape[0]
    fields = {"targets": one_hot(size, size), "decode": None, "rng": key()} | fields
    decode = fields.pop("decode")

    def apply(activation, targets, rng):
        labels = jnp.argmax(targets, axis=-1)
        site = Site(activation, targets, labels, decode, losses.cross_entropy, rng, axis_name)
        out = perturbation.apply((), site).activation
        return (0.0 if gradient_of is None else jnp.sum(gradient_of * out)), out

    if gradient_of is None:
        return jax.jit(apply)(activation, **fields)[1]
    gradient, out = jax.jit(jax.grad(apply, has_aux=True))(activation, **fields)
    return out, gradient


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one_hot(size, num_classes):
    return np.eye(num_classes, dtype=np.float32)[np.arange(size) % num_classes]


# Dropout


def test_dropout_zeroes_a_share_of_the_units_and_rescales_the_rest():
    h = normal(100, 200)
    out = np.asarray(perturbed(perturbations.dropout(0.25), h))
    zeroed = out == 0
    # 20000 Bernoulli draws have a standard error of 0.003.
    assert abs(zeroed.mean() - 0.25) < 0.015
    np.testing.assert_allclose(out[~zeroed], np.asarray(h)[~zeroed] / 0.75, rtol=1e-6)
    assert zeroed.mean(axis=0).max() < 1, "a mask of its own for every example"


def test_dropout_rescales_bfloat16_without_rounding_the_factor():
    h = 1.0 + np.arange(128, dtype=np.float32).reshape(4, 32) / 128  # exact in bfloat16
    out = np.asarray(perturbed(perturbations.dropout(0.1), jnp.asarray(h, jnp.bfloat16)))
    expected = (h / np.float32(0.9)).astype(out.dtype)
    kept = out != 0
    np.testing.assert_array_equal(out[kept], expected[kept])


def test_dropout_gradient_is_the_mask():
    h = np.ones((4, 50), np.float32)
    out, gradient = perturbed(perturbations.dropout(0.5), h, gradient_of=1.0)
    np.testing.assert_array_equal(gradient, out)


# Spatial dropout


def test_spatial_dropout_zeroes_whole_channels():
    out = np.asarray(
        perturbed(perturbations.spatial_dropout(0.25), np.ones((200, 3, 2, 50), np.float32))
    )
    by_channel = out.reshape(200, 6, 50)
    np.testing.assert_array_equal(by_channel, np.broadcast_to(by_channel[:, :1], (200, 6, 50)))
    np.testing.assert_allclose(np.unique(out), [0.0, 1 / 0.75], rtol=1e-6)
    assert abs((by_channel[:, 0] == 0).mean() - 0.25) < 0.02


@pytest.mark.parametrize(
    ("shape", "block_size", "same_as"),
    [
        ((6, 5), None, perturbations.dropout(0.5)),
        ((6, 5), 3, perturbations.dropout(0.5)),
        ((6, 4, 3, 5), 1, perturbations.dropout(0.5)),
        ((6, 4, 3, 5), 9, perturbations.spatial_dropout(0.5)),
    ],
    ids=["no positions", "no positions, blocks", "one position", "block as large as the map"],
)
def test_spatial_dropout_has_dropout_and_whole_channels_as_limits(shape, block_size, same_as):
    h = normal(*shape)
    out = perturbed(perturbations.spatial_dropout(0.5, block_size=block_size), h)
    np.testing.assert_array_equal(out, perturbed(same_as, h))


def test_blocks_are_contiguous_and_unbiased_at_every_position():
    size, height, width, side, rate = 4000, 5, 4, 2, 0.3
    blocks = perturbations.spatial_dropout(rate, block_size=side)
    out = np.asarray(perturbed(blocks, np.ones((size, height, width, 1), np.float32)))[..., 0]
    dropped = out == 0

    covered = np.zeros_like(dropped)
    for top in range(height - side + 1):
        for left in range(width - side + 1):
            window = np.s_[:, top : top + side, left : left + side]
            whole = dropped[window].all(axis=(1, 2))
            covered[window] |= whole[:, np.newaxis, np.newaxis]
    np.testing.assert_array_equal(dropped, covered)

    gamma = rate * height * width / (side**2 * (height - side + 1) * (width - side + 1))
    corner, interior = 1 - gamma, (1 - gamma) ** 4  # one and four blocks cover them
    np.testing.assert_allclose(out[:, 0, 0].max(), 1 / corner, rtol=1e-5)
    np.testing.assert_allclose(out[:, 2, 1].max(), 1 / interior, rtol=1e-5)
    np.testing.assert_allclose(out.mean(axis=0), 1.0, atol=5 * out.std(axis=0).max() / size**0.5)
    assert 0.2 < dropped.mean() < rate


# Gaussian noise


def test_gaussian_noise_has_sigma_root_mean_squares():
    h = 3.0 * normal(50, 20, 20) + 1.0
    noise = np.asarray(perturbed(perturbations.gaussian_noise(0.2), h) - h)
    rms = np.sqrt(np.mean(np.square(np.asarray(h))))
    # 20000 draws: standard errors 0.007 of the mean and 0.005 of the deviation, in noise units.
    assert abs(noise.mean()) < 0.03 * 0.2 * rms
    np.testing.assert_allclose(noise.std(), 0.2 * rms, rtol=0.02)


def test_gaussian_noise_is_a_constant_of_the_gradient():
    _, gradient = perturbed(perturbations.gaussian_noise(0.5), normal(4, 6), gradient_of=1.0)
    np.testing.assert_array_equal(gradient, np.ones((4, 6)))


def test_gaussian_noise_measures_the_activation_on_all_devices():
    h = np.stack([normal(3, 5), 10.0 * normal(3, 5, seed=1)])
    run = functools.partial(perturbed, perturbations.gaussian_noise(0.5), targets=one_hot(3, 3))
    out = jax.vmap(lambda h: run(h, axis_name="devices"), axis_name="devices")(h)
    alone = run(h[0])  # the same key, its own measure
    ratio = np.asarray(out[0] - h[0]) / np.asarray(alone - h[0])
    expected = np.sqrt(np.mean(np.square(h)) / np.mean(np.square(h[0])))
    np.testing.assert_allclose(ratio, expected, rtol=1e-3)


# Manifold Mixup


def test_mixup_is_convex_with_one_coefficient_and_a_permutation():
    # Mixing one-hot rows shows the partner and its share of every example.
    mixup, rows = perturbations.manifold_mixup(1.0), jnp.eye(8)
    site = Site(rows, rows, jnp.arange(8), None, losses.cross_entropy, key(1))
    activation, targets, _, _ = jax.jit(lambda: mixup.apply((), site))()
    activation = np.asarray(activation)
    off_diagonal = activation - np.diag(np.diag(activation))
    mixed = off_diagonal.any(axis=1)
    partners, shares = off_diagonal[mixed].argmax(axis=1), off_diagonal[mixed].max(axis=1)
    assert len(partners) > 1
    assert len(set(partners)) == len(partners)
    np.testing.assert_allclose(shares, shares[0], rtol=1e-6)
    np.testing.assert_allclose(activation.sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(targets, activation)


def test_mixup_gradient_reaches_both_partners():
    weights = normal(4, 4)
    mixing, gradient = perturbed(
        perturbations.manifold_mixup(1.0), one_hot(4, 4), gradient_of=weights
    )
    assert np.count_nonzero(mixing) > 4
    np.testing.assert_allclose(gradient, np.asarray(mixing).T @ weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0])
def test_mixing_share_follows_the_symmetric_beta_distribution(alpha):
    draws = np.asarray(partner_share(jax.random.key(0), alpha, (20000,)), np.float64)
    reference = np.random.default_rng(0).beta(alpha, alpha, 20000)
    grid = [0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999]
    empirical, expected = ((x[:, np.newaxis] <= grid).mean(axis=0) for x in (draws, reference))
    # The difference of two empirical distributions has a standard error of at most 0.005.
    np.testing.assert_allclose(empirical, expected, atol=0.02)
    assert draws.min() >= 0
    assert draws.max() <= 1


# MixStyle


def channel_style(h):
    return h.mean(axis=(1, 2)), np.sqrt(h.var(axis=(1, 2)) + 1e-6)


def test_mixstyle_interpolates_the_channel_statistics_of_two_examples():
    scale = 0.5 + np.abs(normal(5, 1, 1, 6, seed=1))
    h = scale * normal(5, 4, 3, 6) + normal(5, 1, 1, 6, seed=2)
    mixstyle = perturbations.mixstyle(1.0, probability=1.0)
    out, gradient = perturbed(mixstyle, h, gradient_of=1.0)
    h, out = np.asarray(h, np.float64), np.asarray(out, np.float64)
    mean, deviation = channel_style(h)
    new_mean, new_deviation = channel_style(out)
    partners, shares = [], []
    for i in range(5):
        fits = {}
        for j in range(5):
            direction = mean[j] - mean[i]
            share = direction @ (new_mean[i] - mean[i]) / max(direction @ direction, 1e-12)
            fits[j] = (np.abs(mean[i] + share * direction - new_mean[i]).max(), share)
        partner = min(fits, key=lambda j: fits[j][0])
        error, share = fits[partner]
        assert error < 1e-5
        expected = deviation[i] + share * (deviation[partner] - deviation[i])
        np.testing.assert_allclose(new_deviation[i], expected, rtol=1e-4)
        content = (h[i] - mean[i]) / deviation[i]
        np.testing.assert_allclose((out[i] - new_mean[i]) / expected, content, atol=1e-4)
        partners.append(partner)
        shares.append(share)
    moved = [share for i, (j, share) in enumerate(zip(partners, shares, strict=True)) if i != j]
    assert len(moved) >= 2
    assert np.ptp(moved) > 0.01, "every example draws its own coefficient"
    assert sorted(partners) == list(range(5))
    # The statistics are constants of the step: all that a gradient meets is the rescaling.
    rescaling = (new_deviation / deviation)[:, np.newaxis, np.newaxis]
    np.testing.assert_allclose(gradient, np.broadcast_to(rescaling, h.shape), rtol=1e-4)


def test_mixstyle_leaves_a_batch_alone_or_restyles_all_of_it():
    mixstyle, h = perturbations.mixstyle(2.0, probability=0.25), normal(3, 2, 2, 2)
    apply = jax.jit(jax.vmap(lambda rng: perturbed(mixstyle, h, rng=rng)))
    out = np.asarray(apply(jax.random.split(jax.random.key(0), 2000)))
    changed = (out != np.asarray(h)).any(axis=(1, 2, 3, 4))
    # 2000 Bernoulli draws have a standard error of 0.01; one permutation in six moves nothing, but
    # even then the statistics pass through rounding.
    assert 0.25 * 5 / 6 - 0.04 < changed.mean() < 0.25 + 0.04


def test_mixstyle_needs_positions():
    with pytest.raises(ValueError, match=r"\[B, positions..., channels\], got shape \(8, 16\)$"):
        perturbations.mixstyle().init(jax.ShapeDtypeStruct((8, 16), jnp.float32), 10)


# Adversarial feature perturbation

CLASSES, WIDTH = 3, 4
WEIGHTS = np.random.default_rng(7).normal(size=(WIDTH, CLASSES))


def linear_decode(h):
    return h @ jnp.asarray(WEIGHTS, h.dtype)


def adversarial_reference(h, targets, radius, steps, step_size, norm, relative):
    """Sample-level PGD on softmax regression, example by example, in float64."""
    size = {"l2": np.linalg.norm, "linf": lambda v: np.abs(v).max()}[norm]
    eps = radius * (np.mean([size(row) for row in h]) if relative else 1.0)
    out = []
    for row, target in zip(h, targets, strict=True):
        delta = np.zeros(WIDTH)
        for _ in range(steps):
            scores = np.exp((row + delta) @ WEIGHTS)
            gradient = WEIGHTS @ (scores / scores.sum() - target)
            direction = gradient / np.linalg.norm(gradient) if norm == "l2" else np.sign(gradient)
            delta = delta + step_size * eps / steps * direction
            if norm == "l2":
                delta *= min(1.0, eps / np.linalg.norm(delta))
            else:
                delta = np.clip(delta, -eps, eps)
        out.append(row + delta)
    return np.stack(out), eps


@pytest.mark.parametrize(
    ("norm", "scale", "steps", "step_size"),
    [
        ("l2", "relative", 3, 2.5),
        ("l2", "absolute", 1, 0.5),
        ("linf", "relative", 1, 0.5),
        ("linf", "absolute", 3, 2.5),
    ],
)
def test_adversarial_equals_a_loop_over_examples(norm, scale, steps, step_size):
    h, targets = normal(6, WIDTH), one_hot(6, CLASSES)
    method = perturbations.adversarial(0.3, steps, step_size=step_size, norm=norm, scale=scale)
    out, gradient = perturbed(method, h, targets=targets, decode=linear_decode, gradient_of=1.0)
    np.testing.assert_array_equal(gradient, np.ones_like(h))  # delta is a constant of the step
    expected, eps = adversarial_reference(
        np.asarray(h, np.float64), targets, 0.3, steps, step_size, norm, scale == "relative"
    )
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    size = np.abs(out - h).max(axis=1) if norm == "linf" else np.linalg.norm(out - h, axis=1)
    assert np.all(size <= eps * (1 + 1e-6))


def test_adversarial_raises_the_loss_of_every_example_on_feature_maps():
    h, targets = normal(6, 2, 2, WIDTH), one_hot(6, CLASSES)

    def decode(h):
        return linear_decode(h).mean(axis=(1, 2))

    out = perturbed(perturbations.adversarial(0.2, 2), h, targets=targets, decode=decode)
    before, after = (np.asarray(losses.cross_entropy(decode(x), targets)) for x in (h, out))
    assert np.all(after > before)


def test_adversarial_depends_on_the_global_batch_only():
    h, targets = normal(6, WIDTH), one_hot(6, CLASSES)
    h = h * np.arange(1.0, 7.0, dtype=np.float32)[:, None]  # so that the two halves differ in size
    run = functools.partial(perturbed, perturbations.adversarial(0.3, 2), decode=linear_decode)
    whole = run(h, targets=targets)
    halves = jax.vmap(
        lambda h, targets: run(h, targets=targets, axis_name="devices"), axis_name="devices"
    )(h.reshape(2, 3, WIDTH), targets.reshape(2, 3, CLASSES))
    np.testing.assert_allclose(halves.reshape(6, WIDTH), whole, rtol=1e-5)


# Bad input


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dropout", {"rate": 1.0}, r"rate must be in \[0, 1\), got 1.0"),
        ("dropout", {"rate": float("nan")}, r"rate must be in \[0, 1\), got nan"),
        ("spatial_dropout", {"rate": -0.1}, r"rate must be in \[0, 1\), got -0.1"),
        ("spatial_dropout", {"block_size": 0}, "block_size must be a whole number >= 1, got 0"),
        ("spatial_dropout", {"block_size": 2.5},
         r"block_size must be a whole number >= 1, got 2\.5"),
        ("gaussian_noise", {"sigma": -1.0}, "sigma must be finite and >= 0, got -1.0"),
        ("manifold_mixup", {"alpha": -1.0}, "alpha must be finite and >= 0, got -1.0"),
        ("mixstyle", {"alpha": float("inf")}, "alpha must be finite and >= 0, got inf"),
        ("mixstyle", {"probability": 1.1}, r"probability must be in \[0, 1\], got 1.1"),
        ("adversarial", {"radius": -1.0}, "radius must be finite and >= 0, got -1.0"),
        ("adversarial", {"steps": 1.5}, "steps must be a whole number >= 0, got 1.5"),
        ("adversarial", {"step_size": 0.0}, "step_size must be finite and > 0, got 0.0"),
        ("adversarial", {"norm": "l1"}, "norm must be one of l2, linf, got 'l1'"),
        ("adversarial", {"scale": "big"}, "scale must be one of relative, absolute, got 'big'"),
    ],
)  # fmt: skip
def test_bad_option_is_refused_in_one_line(name, arguments, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        perturbations.create(name, **arguments)
