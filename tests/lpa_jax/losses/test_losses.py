"""Losses against values worked out by hand, and the properties that every one of them has."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import losses

COUNTS = (64.0, 8.0, 1.0)

# Softmax (1/8, 2/8, 5/8).
LOGITS = np.log([1.0, 2.0, 5.0])
LN = math.log

# name: (loss, logits, targets, expected), expected worked out on paper from the published formula.
BY_HAND = {
    "cross_entropy hard": (losses.cross_entropy, LOGITS, (1, 0, 0), LN(8)),
    "cross_entropy soft": (losses.cross_entropy, LOGITS, (0.5, 0, 0.5), (LN(8) + LN(1.6)) / 2),
    # t' = (0.8, 0.1, 0.1)
    "label_smoothing hard": (losses.label_smoothing(0.3), LOGITS, (1, 0, 0),
                             0.8 * LN(8) + 0.1 * LN(4) + 0.1 * LN(1.6)),
    # t' = (0.45, 0.1, 0.45)
    "label_smoothing soft": (losses.label_smoothing(0.3), LOGITS, (0.5, 0, 0.5),
                             0.45 * LN(8) + 0.1 * LN(4) + 0.45 * LN(1.6)),
    # (8, 4, 4) * (1, 2, 5) = (8, 8, 20), sum 36
    "logit_adjusted hard": (losses.logit_adjusted((8, 4, 4)), LOGITS, (1, 0, 0), LN(4.5)),
    # (64, 16, 16) * (1, 2, 5) = (64, 32, 80), sum 176
    "logit_adjusted soft, tau 2": (losses.logit_adjusted((8, 4, 4), tau=2.0), LOGITS, (0.5, 0, 0.5),
                                   (LN(2.75) + LN(2.2)) / 2),
    "balanced_softmax hard": (losses.balanced_softmax((8, 4, 4)), LOGITS, (0, 0, 1), LN(1.8)),
    "balanced_softmax soft": (losses.balanced_softmax((8, 4, 4)), LOGITS, (0.5, 0.25, 0.25),
                              0.75 * LN(4.5) + 0.25 * LN(1.8)),
    # margins (0.25, 0.25, 0.5); 2 (z - margin) = (0, 0, 0)
    "ldam hard": (losses.ldam((16, 16, 1), 0.5, 2.0), (0, 0, 0.5), (0, 0, 1), LN(3)),
    # 2 (z - t * margin) = (-0.25, 0, 0.5)
    "ldam soft": (losses.ldam((16, 16, 1), 0.5, 2.0), (0, 0, 0.5), (0.5, 0, 0.5),
                  LN(math.exp(-0.25) + 1 + math.exp(0.5)) - 0.125),
    # softplus of (ln 1, ln 2, ln 5) is (ln 2, ln 3, ln 6)
    "sigmoid_cross_entropy, one unknown": (losses.sigmoid_cross_entropy(), LOGITS, (1, -1, 0),
                                           LN(2) + LN(6)),
    "sigmoid_cross_entropy, soft": (losses.sigmoid_cross_entropy(), LOGITS, (0, 0.5, 1),
                                    LN(2) + LN(3) - LN(2) / 2 + LN(6) - LN(5)),
    "focal hard": (losses.focal(2.0), LOGITS, (0, 0, 1), (3 / 8) ** 2 * LN(1.6)),
    "focal soft, gamma 0.5": (losses.focal(0.5), LOGITS, (0.5, 0, 0.5),
                              ((7 / 8) ** 0.5 * LN(8) + (3 / 8) ** 0.5 * LN(1.6)) / 2),
    # 1 / E = (1, 2/3, 4/7), sum 47/21, so w = (63, 42, 36) / 47
    "class_balanced hard": (losses.class_balanced((1, 2, 3), beta=0.5), LOGITS, (1, 0, 0),
                            63 / 47 * LN(8)),
    "class_balanced focal soft": (
        losses.class_balanced((1, 2, 3), beta=0.5, base=losses.focal(1.0)),
        LOGITS,
        (0.5, 0, 0.5),
        99 / 94 * (7 / 8 * LN(8) + 3 / 8 * LN(1.6)) / 2,
    ),
}  # fmt: skip

# Every registered loss, and the options with a numerical trap of their own.
ALL = {name: losses.create(name, COUNTS) for name in losses.names()} | {
    "focal, gamma 0": losses.focal(0.0),
    "focal, gamma 0.5": losses.focal(0.5),
    "class_balanced focal": losses.class_balanced(COUNTS, base=losses.focal(0.5)),
    "drw": losses.drw_stages(COUNTS, 1)[1][1],
}
every_loss = pytest.mark.parametrize("loss", ALL.values(), ids=ALL.keys())


def problem(dtype=jnp.float32):
    """Logits and targets [4, 3]: two hard targets and two soft ones."""
    rng = np.random.default_rng(0)
    targets = np.concatenate([np.eye(3)[[0, 2]], rng.dirichlet(np.ones(3), size=2)])
    return jnp.asarray(rng.normal(size=(4, 3)), dtype), jnp.asarray(targets, jnp.float32)


@pytest.mark.parametrize(("loss", "logits", "targets", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_value_equals_the_one_worked_out_by_hand(loss, logits, targets, expected):
    # The second row makes sure that examples do not mix.
    logits = jnp.array([logits, (0.0, 0.0, 0.0)], jnp.float32)
    targets = jnp.array([targets, (0.0, 1.0, 0.0)], jnp.float32)
    value = loss(logits, targets)
    assert value.shape == (2,)
    np.testing.assert_allclose(value[0], expected, rtol=2e-6)


@every_loss
def test_gradient_is_finite_for_extreme_logits(loss):
    # Predictions that are certain and right, certain and wrong, tied, and undecided.
    logits = jnp.array([[1e4, -1e4, -1e4]] * 3 + [[1e4, 1e4, -1e4], [0.0, 0.0, 0.0]], jnp.float32)
    targets = jnp.array([[1, 0, 0], [0, 0, 1], [0.5, 0.5, 0], [0, 0, 1], [0.2, 0.3, 0.5]])
    value, pull_back = jax.vjp(lambda z: loss(z, targets), logits)
    (gradient,) = pull_back(jnp.ones_like(value))
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(gradient))
    assert float(jnp.abs(gradient[1]).max()) > 0.0, "a certain and wrong prediction must be pushed"


@every_loss
def test_shifting_all_logits_changes_nothing(loss):
    if loss is ALL["sigmoid_cross_entropy"]:
        pytest.skip("a loss of each class apart")
    logits, targets = problem()
    # The scale of LDAM multiplies the rounding error of the sum by 30.
    np.testing.assert_allclose(loss(logits + 7.0, targets), loss(logits, targets), rtol=1e-4)


@every_loss
def test_bfloat16_logits_are_computed_in_float32(loss):
    logits, targets = problem(jnp.bfloat16)
    value = loss(logits, targets.astype(jnp.bfloat16))
    assert value.dtype == jnp.float32
    exact = loss(logits.astype(jnp.float32), targets.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(value, exact)


@pytest.mark.parametrize("name", ["balanced_softmax", "ldam", "class_balanced"])
def test_leading_axes_are_free(name):
    loss = losses.create(name, COUNTS)
    logits, targets = problem()
    grid = loss(logits.reshape(2, 2, 3), targets.reshape(2, 2, 3))
    np.testing.assert_allclose(grid, loss(logits, targets).reshape(2, 2), rtol=1e-6)
    np.testing.assert_allclose(loss(logits[0], targets[0]), grid[0, 0], rtol=1e-6)


@every_loss
def test_loss_is_a_static_argument_of_jit_and_compiles_once(loss):
    compiled = []

    @functools.partial(jax.jit, static_argnames="loss")
    def mean(logits, targets, loss):
        compiled.append(loss)
        return jnp.mean(loss(logits, targets))

    logits, targets = problem()
    value = mean(logits, targets, loss=loss)
    mean(logits + 1.0, targets, loss=loss)
    assert len(compiled) == 1
    np.testing.assert_allclose(value, np.mean(loss(logits, targets)), rtol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        losses.label_smoothing(0.0),
        losses.focal(0.0),
        losses.logit_adjusted(COUNTS, tau=0.0),
        losses.logit_adjusted((5, 5, 5)),
        losses.balanced_softmax((5, 5, 5)),
        losses.ldam(COUNTS, max_margin=0.0, scale=1.0),
        losses.class_balanced(COUNTS, beta=0.0),
        losses.class_balanced((5, 5, 5)),
    ],
)
def test_loss_at_its_neutral_setting_is_cross_entropy(loss):
    logits, targets = problem()
    np.testing.assert_allclose(
        loss(logits, targets), losses.cross_entropy(logits, targets), rtol=2e-6
    )


def test_balanced_softmax_is_logit_adjustment_at_tau_1():
    logits, targets = problem()
    np.testing.assert_allclose(
        losses.balanced_softmax(COUNTS)(logits, targets),
        losses.logit_adjusted(COUNTS, tau=1.0)(logits, targets),
        rtol=2e-6,
    )


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_gradient_equals_the_published_derivative(gamma):
    # Lin et al., appendix B: d/dz_y = (1 - p)^gamma (gamma p log p + p - 1).
    gradient = jax.grad(lambda z: losses.focal(gamma)(z, jnp.array([0.0, 1.0, 0.0])))
    p = 0.25
    expected = (1 - p) ** gamma * (gamma * p * math.log(p) + p - 1)
    np.testing.assert_allclose(gradient(jnp.asarray(LOGITS, jnp.float32))[1], expected, rtol=1e-5)


def test_effective_number_weights_go_from_equal_to_inverse_frequency():
    np.testing.assert_array_equal(losses.effective_number_weights(COUNTS, beta=0.0), np.ones(3))
    inverse = 1.0 / np.array(COUNTS)
    nearly_one = losses.effective_number_weights(COUNTS, beta=1.0 - 1e-12)
    np.testing.assert_allclose(nearly_one, 3 * inverse / inverse.sum(), rtol=1e-9)
    assert losses.effective_number_weights(COUNTS).sum() == pytest.approx(3.0)


def test_drw_weighs_ldam_by_class_from_the_switch_epoch_on():
    (start, before), (switch, after) = losses.drw_stages(
        COUNTS, 160, max_margin=2.0, scale=1.0, beta=0.9
    )
    assert (start, switch) == (0, 160)
    logits, targets = jnp.zeros((3, 3)), jnp.eye(3)
    margin = losses.ldam(COUNTS, max_margin=2.0, scale=1.0)(logits, targets)
    np.testing.assert_array_equal(before(logits, targets), margin)
    weights = losses.effective_number_weights(COUNTS, 0.9)
    mean = (np.array(COUNTS) * weights).sum() / np.sum(COUNTS)
    np.testing.assert_allclose(after(logits, targets), weights * margin / mean, rtol=1e-6)


def test_drw_on_the_whole_training_set_is_the_weighted_mean_of_the_released_code():
    # PyTorch's cross_entropy(..., weight=w) divides by the batch's sum of weights.
    labels = np.repeat(np.arange(3), COUNTS)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(labels.size, 3)), jnp.float32)
    targets = jnp.eye(3)[labels]
    (_, before), (_, after) = losses.drw_stages(COUNTS, 1, scale=1.0, beta=0.999)
    weights = losses.effective_number_weights(COUNTS, 0.999)[labels]
    published = np.average(before(logits, targets), weights=weights)
    np.testing.assert_allclose(after(logits, targets).mean(), published, rtol=1e-5)


def test_adjusted_logits_are_the_posterior_under_a_uniform_prior():
    # Posterior (1, 2, 5) / 8 under the prior (8, 4, 4) / 16 is (1, 4, 10) / 15 under a uniform one.
    adjusted = losses.adjust_logits(jnp.asarray(LOGITS[None], jnp.bfloat16), (8, 4, 4))
    assert adjusted.dtype == jnp.float32
    np.testing.assert_allclose(jax.nn.softmax(adjusted)[0], np.array([1, 4, 10]) / 15, rtol=1e-2)
    twice = losses.adjust_logits(jnp.zeros((1, 3)), (8, 4, 4), tau=2.0)
    np.testing.assert_allclose(
        twice[0], [-2 * LN(1 / 2), -2 * LN(1 / 4), -2 * LN(1 / 4)], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("factory", "defaults"),
    [
        (losses.label_smoothing, {"smoothing": 0.1}),
        (losses.focal, {"gamma": 2.0}),
        (losses.class_balanced, {"beta": 0.9999, "base": losses.cross_entropy}),
        (losses.ldam, {"max_margin": 0.5, "scale": 30.0}),
        (losses.drw_stages, {"max_margin": 0.5, "scale": 30.0, "beta": 0.9999}),
        (losses.logit_adjusted, {"tau": 1.0}),
        (losses.adjust_logits, {"tau": 1.0}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_defaults_are_the_published_ones(factory, defaults):
    parameters = inspect.signature(factory).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == defaults


def test_later_changes_of_the_counts_do_not_reach_the_loss():
    counts = np.array(COUNTS)
    loss = losses.balanced_softmax(counts)
    logits, targets = problem()
    before = loss(logits, targets)
    counts[:] = 1.0
    np.testing.assert_array_equal(loss(logits, targets), before)


NEED_COUNTS = ("logit_adjusted", "balanced_softmax", "ldam", "class_balanced")


@pytest.mark.parametrize("name", NEED_COUNTS)
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (None, "counts must be given .*got None"),
        ((3, 0), "counts must be finite and > 0, got 0 at position 1"),
        ((3, -1), "counts must be finite and > 0, got -1 at position 1"),
        ((math.nan, 1), "counts must be finite and > 0, got nan at position 0"),
        ((1, math.inf), "counts must be finite and > 0, got inf at position 1"),
        ([[3, 1]], r"counts must be a non-empty vector of numbers, got shape \(1, 2\)"),
        (3, r"counts must be a non-empty vector of numbers, got shape \(\)"),
        ((), r"counts must be a non-empty vector of numbers, got shape \(0,\)"),
        (("many", "few"), "counts must be a vector of numbers known on the host, got tuple"),
    ],
)
def test_bad_counts_are_refused_by_name(name, counts, message):
    with pytest.raises(ValueError, match=message):
        losses.create(name, counts)


@pytest.mark.parametrize("name", NEED_COUNTS)
def test_counts_of_another_number_of_classes_are_refused(name):
    loss = losses.create(name, (2, 1))
    with pytest.raises(ValueError, match="counts must have one entry for each of the 3 classes"):
        loss(*problem())


@every_loss
def test_labels_in_place_of_targets_are_refused(loss):
    with pytest.raises(ValueError, match=r"targets must be class probabilities .*got shape \(4,\)"):
        loss(problem()[0], jnp.array([0, 1, 2, 0]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hinge", {}, "loss must be one of balanced_softmax, class_balanced, .*got 'hinge'"),
        ("focal", {"beta": 0.9}, "option of loss 'focal' must be one of gamma, got 'beta'"),
        ("cross_entropy", {"gamma": 1.0},
         "option of loss 'cross_entropy' must be none at all, got 'gamma'"),
        ("label_smoothing", {"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1\.0"),
        ("label_smoothing", {"smoothing": -0.1}, r"smoothing must be in \[0, 1\), got -0\.1"),
        ("logit_adjusted", {"tau": -1.0}, r"tau must be finite and >= 0, got -1\.0"),
        ("logit_adjusted", {"tau": math.inf}, "tau must be finite and >= 0, got inf"),
        ("ldam", {"max_margin": math.inf}, "max_margin must be .*got inf"),
        ("ldam", {"max_margin": -0.1}, "max_margin must be .*got -0.1"),
        ("ldam", {"scale": math.inf}, "scale must be finite and > 0, got inf"),
        ("ldam", {"scale": 0.0}, r"scale must be finite and > 0, got 0\.0"),
        ("focal", {"gamma": math.nan}, "gamma must be .*got nan"),
        ("focal", {"gamma": -0.1}, "gamma must be .*got -0.1"),
        ("class_balanced", {"beta": 1.0}, r"beta must be in \[0, 1\), got 1\.0"),
        ("class_balanced", {"beta": -0.1}, r"beta must be in \[0, 1\), got -0\.1"),
        ("class_balanced", {"base": "focal"}, r"base must be a loss.*got 'focal'"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=message):
        losses.create(name, COUNTS, **options)


@pytest.mark.parametrize("epoch", [0, -1, 1.5, True])
def test_bad_switch_epoch_is_refused(epoch):
    with pytest.raises(ValueError, match="switch_epoch must be a whole number >= 1, got"):
        losses.drw_stages(COUNTS, epoch)
