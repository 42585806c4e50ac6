"""Similarity and calibration against slow NumPy references."""

import numpy as np
import pytest

from lpa_jax.diagnostics import (
    error_consistency,
    expected_calibration_error,
    linear_cka,
    negative_log_likelihood,
    prediction_agreement,
    reliability,
)

RNG = np.random.default_rng(0)


def gram(x):
    x = x.reshape(len(x), -1)
    return x @ x.T


def reference_cka(x, y):
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = (centre @ gram(v) @ centre for v in (x, y))
    return np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))


def reference_unbiased_hsic(x, y):
    """Song et al. 2012 as an average over ordered quadruples of different examples."""
    k, m = gram(x), gram(y)
    n, total, count = len(x), 0.0, 0
    for i in range(n):
        for j in set(range(n)) - {i}:
            for q in set(range(n)) - {i, j}:
                for r in set(range(n)) - {i, j, q}:
                    total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
                    count += 1
    return total / count


@pytest.mark.parametrize("width", [3, 40])
def test_cka_is_that_of_the_centred_grams(width):
    x = RNG.normal(size=(12, width)) + 5
    y = x[:, :2] + RNG.normal(size=(12, 2))
    np.testing.assert_allclose(linear_cka(x, y), reference_cka(x, y), rtol=1e-4)
    z = RNG.normal(size=(12, 5, 8))
    np.testing.assert_allclose(linear_cka(x, z), reference_cka(x, z), rtol=1e-4)


def test_debiased_cka_is_the_average_over_quadruples():
    x, y = RNG.normal(size=(7, 3)), RNG.normal(size=(7, 4))
    y[:, :3] += x
    expected = reference_unbiased_hsic(x, y) / np.sqrt(
        reference_unbiased_hsic(x, x) * reference_unbiased_hsic(y, y)
    )
    np.testing.assert_allclose(linear_cka(x, y, debiased=True), expected, rtol=1e-4)


def test_cka_ignores_rotation_shift_and_scale_of_any_size():
    x = RNG.normal(size=(20, 6))
    rotation = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    for scale in (1e-15, 3.0, 1e15):
        y = scale * (x @ rotation + 1)
        np.testing.assert_allclose(linear_cka(x, y), 1, rtol=1e-4)
        np.testing.assert_allclose(linear_cka(x, y, debiased=True), 1, rtol=1e-4)


def test_only_the_debiased_estimate_sees_independence_in_many_dimensions():
    x, y = RNG.normal(size=(2, 50, 1000))
    assert linear_cka(x, y) > 0.9 and abs(linear_cka(x, y, debiased=True)) < 0.05


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (np.ones((1, 2)), np.ones((1, 2)), {}, "at least 2, got 1 and 1"),
        (np.eye(3), np.eye(4), {}, "the same examples, at least 2, got 3 and 4"),
        (np.eye(3), np.eye(3), {"debiased": True}, "at least 4, got 3 and 3"),
        (np.ones((3, 2)), np.eye(3), {}, "x must differ between examples"),
        (np.eye(3), np.ones((3, 2)), {}, "y must differ between examples"),
        (np.eye(3) * np.nan, np.eye(3), {}, "x must be finite"),
        (np.ones(3), np.eye(3), {}, r"x must be activations \[n, \.\.\.\], got shape \(3,\)"),
    ],
)
def test_representations_that_cannot_be_compared_are_refused(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        linear_cka(x, y, **options)


def test_agreement_counts_equal_predictions():
    a, b = RNG.normal(size=(2, 50, 4))
    expected = np.mean([np.argmax(p) == np.argmax(q) for p, q in zip(a, b, strict=True)])
    assert prediction_agreement(a, b) == expected and prediction_agreement(a, 2 * a) == 1


def test_error_consistency_is_cohens_kappa():
    #          both right 4, only a 2, only b 1, none 3: o = 0.7, e = 0.6 * 0.5 + 0.4 * 0.5 = 0.5
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    a = [right] * 6 + [wrong] * 4
    b = [right] * 4 + [wrong] * 2 + [right] + [wrong] * 3
    assert error_consistency(a, b, [0] * 10) == pytest.approx(0.4)
    assert np.isnan(error_consistency([right], [right], [0]))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((0, 3)), np.zeros((0, 3)), r"a and b must be logits.*got a \(0, 3\)"),
        (np.zeros((2, 3)), np.zeros((2, 4)), r"got a \(2, 3\) beside \(2, 4\)"),
        (np.zeros((2, 3)), np.full((2, 3), np.inf), "b must be finite"),
    ],
)
def test_logits_that_cannot_be_compared_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        prediction_agreement(a, b)


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"labels must have one entry for each of 2 rows"):
        error_consistency(np.eye(2), np.eye(2), [0])


@pytest.fixture(scope="module")
def predictions():
    """Logits, labels, and by slow loops the confidences and whether they are right."""
    logits, labels = 2 * RNG.normal(size=(200, 5)), RNG.integers(0, 5, 200)
    confidence, right = [], []
    for z, y in zip(logits, labels, strict=True):
        p = np.exp(z) / np.exp(z).sum()
        confidence.append(p.max())
        right.append(float(np.argmax(p) == y))
    return logits, labels, np.array(confidence), np.array(right)


def test_ece_is_the_weighted_gap_over_equal_widths(predictions):
    logits, labels, confidence, right = predictions
    expected = 0.0
    for k in range(15):
        members = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if members.any():
            expected += members.mean() * abs(confidence[members].mean() - right[members].mean())
    assert expected_calibration_error(logits, labels) == pytest.approx(expected)
    curve = reliability(logits, labels)
    assert curve.count.sum() == 200 and np.isnan(curve.accuracy[0])  # 5 classes: never below 1/5


def test_adaptive_bins_hold_equally_many(predictions):
    logits, labels, confidence, right = predictions
    curve = reliability(logits, labels, bins=7, adaptive=True)
    assert set(curve.count) == {28, 29}
    order, start, expected = np.argsort(confidence), 0, 0.0
    for k, count in enumerate(curve.count):
        members = order[start : start + count]
        np.testing.assert_allclose(curve.confidence[k], confidence[members].mean())
        np.testing.assert_allclose(curve.accuracy[k], right[members].mean())
        expected += count / 200 * abs(confidence[members].mean() - right[members].mean())
        start += count
    assert curve.expected_calibration_error == pytest.approx(expected)
    assert np.all(np.diff(curve.edges) >= 0)
    np.testing.assert_allclose(curve.edges[[0, -1]], [confidence.min(), confidence.max()])


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    logits = np.log([[0.6, 0.4], [0.8, 0.2]])
    assert reliability(logits, [0, 0], bins=5).count.tolist() == [0, 0, 1, 1, 0]


def test_certain_predictions_stay_finite():
    logits = np.array([[1000.0, 0.0], [0.0, 1000.0]])
    assert expected_calibration_error(logits, [0, 0]) == 0.5
    assert negative_log_likelihood(logits, [0, 0]) == 500.0


def test_likelihood_is_the_mean_of_log_probabilities(predictions):
    logits, labels, *_ = predictions
    expected = [np.log(np.exp(z).sum()) - z[y] for z, y in zip(logits, labels, strict=True)]
    assert negative_log_likelihood(logits, labels) == pytest.approx(np.mean(expected))


@pytest.mark.parametrize(
    ("logits", "labels", "options", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), {}, r"with n > 0, got \(0, 2\) and \(0,\)"),
        (np.zeros((2, 2)), [0], {}, r"got \(2, 2\) and \(1,\)"),
        (np.zeros((1, 2)), [2], {}, r"labels must be in 0\.\.1, got 2 at position 0"),
        (np.full((1, 2), np.nan), [0], {}, "logits must be finite"),
        (np.zeros((1, 2)), [0], {"bins": 0}, "bins must be a whole number >= 1, got 0"),
    ],
)
def test_bad_predictions_are_refused(logits, labels, options, message):
    with pytest.raises(ValueError, match=message):
        reliability(logits, labels, **options)
