"""Assignment rules against values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import assignment
from lpa_jax.perturbations import Site, lpa
from tests.helpers import reference

PRESENT = jnp.ones(4, bool)


def signs(rule, confidence, present):
    return rule(jnp.asarray(confidence), jnp.asarray(present))[0].tolist()


def multipliers(rule, confidence=(0.0,) * 4, present=PRESENT):
    return rule(jnp.asarray(confidence), jnp.asarray(present))[1]


def test_confidence_raises_the_loss_of_classes_below_the_mean_and_lowers_it_above():
    # tau = (0.25 + 0.5 + 0.75 + 0.5) / 4 = 0.5; m = 1 + 2 |0.5 - q|.
    confidence = [0.25, 0.5, 0.75, 0.5]
    rule = assignment.by_confidence(kappa=2.0)
    assert signs(rule, confidence, PRESENT) == [1, 0, -1, 0]
    np.testing.assert_array_equal(multipliers(rule, confidence), [1.5, 1.0, 1.5, 1.0])
    plain = assignment.by_confidence()
    np.testing.assert_array_equal(multipliers(plain, confidence), np.ones(4))


def test_absent_classes_are_neither_in_tau_nor_given_a_sign():
    # Present: 0.75, 0.5 and tau = 0.625. With the absent ones as zeros, tau were 0.3125: no plus.
    present = [True, False, True, False]
    rule = assignment.by_confidence(kappa=1.0)
    assert signs(rule, [0.75, 0.0, 0.5, 0.0], present) == [-1, 0, 1, 0]
    assert signs(rule, [0.75, 0.9, 0.5, 0.9], present) == [-1, 0, 1, 0]
    multiplier = multipliers(rule, [0.75, 0.0, 0.5, 0.0], present)
    np.testing.assert_array_equal(multiplier[np.array([0, 2])], [1.125, 1.125])
    for fixed in (
        assignment.all_positive(),
        assignment.by_frequency([4, 3, 2, 1]),
        assignment.custom([1, 1, 1, 1]),
    ):
        assert np.array_equal(np.abs(signs(fixed, [0.0] * 4, present)), [1, 0, 1, 0])


def test_no_class_present_gives_no_sign_and_no_nan():
    sign, multiplier = assignment.by_confidence(kappa=1.0)(jnp.zeros(4), ~PRESENT)
    np.testing.assert_array_equal(sign, np.zeros(4))
    assert np.all(np.isfinite(multiplier))


@pytest.mark.parametrize(("num_classes", "confidence"), [(1, 0.3), (10, 0.1), (10, 0.37)])
def test_equally_sure_classes_get_no_sign_whatever_the_rounding(num_classes, confidence):
    rule = assignment.by_confidence()
    sign, _ = rule(jnp.full(num_classes, confidence), jnp.ones(num_classes, bool))
    np.testing.assert_array_equal(sign, np.zeros(num_classes))


def test_a_class_just_off_the_mean_still_gets_a_sign():
    rule = assignment.by_confidence()
    assert signs(rule, [0.5, 0.5002, 0.5, 0.5002], PRESENT) == [1, -1, 1, -1]


def test_frequency_formula_by_hand():
    # Ranks by count: class 2 (80), 0 (40), 3 (20), 1 (10); the head is classes 2 and 0.
    rule = assignment.by_frequency([40, 10, 80, 20], split=2, kappa=1.0)
    sign, multiplier = rule(jnp.zeros(4), PRESENT)
    np.testing.assert_array_equal(sign, [-1, 1, -1, 1])
    head, tail = [1 + 40 / 80, 1 + 80 / 80], [1 + 10 / 10, 1 + 10 / 20]
    np.testing.assert_array_equal(multiplier, [head[0], tail[0], head[1], tail[1]])
    np.testing.assert_array_equal(
        multipliers(assignment.by_frequency([40, 10, 80, 20])), np.ones(4)
    )


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([5, 5, 5, 5], [-1, -1, 1, 1]),
        ([5, 9, 5, 5], [-1, -1, 1, 1]),
        ([5, 5, 5, 9], [-1, 1, 1, -1]),
    ],
)
def test_equal_counts_are_ranked_by_index(counts, expected):
    assert signs(assignment.by_frequency(counts, split=2), [0.0] * 4, PRESENT) == expected


def test_many_equal_counts_are_ranked_by_index():
    # Enough of them that an unstable sort would mix them up.
    counts = np.arange(100) % 3 + 1
    sign, _ = assignment.by_frequency(counts, split=50)(None, jnp.ones(100, bool))
    expected = np.ones(100)
    expected[2::3] = -1  # the 33 classes of 3 examples, then the first 17 of those of 2
    expected[1:52:3] = -1
    np.testing.assert_array_equal(sign, expected)


@pytest.mark.parametrize(
    ("split", "num_classes", "head_size"),
    [
        (0.4, 10, 4),
        (0.6, 6, 4),
        (0.4, 100, 40),
        (4, 10, 4),
        (0, 10, 0),
        (10, 10, 10),
        (0.26, 4, 1),
        (1, 4, 1),
    ],
)
def test_split_is_a_fraction_below_one_and_else_a_number(split, num_classes, head_size):
    counts = np.arange(num_classes, 0, -1)
    sign, _ = assignment.by_frequency(counts, split)(None, jnp.ones(num_classes, bool))
    expected = np.where(np.arange(num_classes) < head_size, -1, 1)
    np.testing.assert_array_equal(sign, expected)


def test_the_default_split_is_two_fifths():
    sign, _ = assignment.by_frequency(np.arange(10, 0, -1))(None, jnp.ones(10, bool))
    assert np.sum(sign < 0) == 4


def test_fixed_rules():
    assert signs(assignment.all_positive(), [0.0] * 4, PRESENT) == [1, 1, 1, 1]
    assert signs(assignment.all_negative(), [0.0] * 4, PRESENT) == [-1, -1, -1, -1]
    rule = assignment.custom([1, 0, -1, 1], [0.5, 1.0, 2.0, 0.0])
    assert signs(rule, [0.0] * 4, PRESENT) == [1, 0, -1, 1]
    np.testing.assert_array_equal(multipliers(rule), [0.5, 1.0, 2.0, 0.0])
    for rule in (assignment.all_positive(), assignment.all_negative(), assignment.custom([1] * 4)):
        np.testing.assert_array_equal(multipliers(rule), np.ones(4))
        assert not rule.uses_confidence


class Visits:
    """LPA at the logits, shown one batch of logits after the other."""

    def __init__(self, num_classes=3, **options):
        self.num_classes = num_classes
        self.perturbation = lpa(1.0, **options)
        batch = jax.ShapeDtypeStruct((4, num_classes), jnp.float32)
        self.state = self.perturbation.init(batch, num_classes)
        self.visit = jax.jit(self.visit)

    def visit(self, state, z, labels):
        site = Site(
            activation=z,
            targets=jax.nn.one_hot(labels, self.num_classes),
            labels=labels,
            decode=lambda h: h,
            loss=reference.jax_cross_entropy,
            rng=jax.random.key(0),
        )
        applied = self.perturbation.apply(state, site)
        return applied.state, applied.aux

    def show(self, z, labels):
        """Shows one batch and returns what `apply` says about it."""
        self.state, aux = self.visit(self.state, jnp.float32(z), jnp.asarray(labels))
        return aux


@pytest.mark.parametrize("mode", ["cold", "carry"])
def test_ema_smooths_the_confidence_in_the_state(mode):
    rng = np.random.default_rng(0)
    visits = Visits(mode=mode, assignment=assignment.by_confidence(ema=0.75))
    np.testing.assert_array_equal(visits.state["confidence"], np.zeros(3))
    expected, known = np.zeros(3), np.zeros(3, bool)
    # Class 2 appears late, class 0 is away for a while: a first value counts in full, and
    # the value of an absent class stays.
    for labels in ([0, 0, 1, 1], [1, 1, 2, 1], [0, 1, 2, 2]):
        z = rng.normal(size=(4, 3))
        batch = reference.class_confidence(z, np.array(labels))
        for c in np.unique(labels):
            expected[c] = 0.75 * expected[c] + 0.25 * batch[c] if known[c] else batch[c]
            known[c] = True
        aux = visits.show(z, labels)
        np.testing.assert_allclose(visits.state["confidence"], expected, rtol=1e-5)
        np.testing.assert_array_equal(visits.state["known"], known)
        # tau is the mean of the smoothed values over the classes in this batch.
        present = np.isin(np.arange(3), labels)
        sign = np.where(present, np.sign(expected[present].mean() - expected), 0)
        np.testing.assert_array_equal(aux["sign"], sign)
        np.testing.assert_array_equal(aux["present"], present)


def test_without_ema_the_sign_is_that_of_the_batch_alone():
    rng = np.random.default_rng(1)
    visits = Visits(assignment=assignment.by_confidence())
    assert not visits.state
    for labels in ([0, 0, 1, 2], [1, 2, 2, 2]):
        z = rng.normal(size=(4, 3))
        confidence = reference.class_confidence(z, np.array(labels))
        present = np.isin(np.arange(3), labels)
        sign = np.where(present, np.sign(confidence[present].mean() - confidence), 0)
        np.testing.assert_array_equal(visits.show(z, labels)["sign"], sign)


def test_an_assignment_for_another_number_of_classes_is_refused():
    batch = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"^assignment 'frequency' is made for 2 classes, the net"):
        lpa(assignment=assignment.by_frequency([2, 1])).init(batch, 3)
    with pytest.raises(
        ValueError, match=r"^assignment 'custom' is made for 2 classes, the network"
    ):
        lpa(assignment=assignment.custom([1, 1])).init(batch, 3)
    assignment.by_confidence().check_num_classes(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: assignment.by_confidence(kappa=-1.0), "kappa must be finite and >= 0, got -1.0"),
        (lambda: assignment.by_confidence(kappa=np.nan), "kappa must be finite and >= 0, got nan"),
        (lambda: assignment.by_confidence(ema=1.0), "ema must be in [0, 1), got 1.0"),
        (lambda: assignment.by_confidence(ema=-0.1), "ema must be in [0, 1), got -0.1"),
        (lambda: assignment.by_frequency([3, 0]),
         "counts must be finite and > 0, got 0 at position 1"),
        (lambda: assignment.by_frequency([]),
         "counts must be a non-empty vector of numbers, got shape (0,)"),
        (lambda: assignment.by_frequency([[3, 1]]),
         "counts must be a non-empty vector of numbers, got shape (1, 2)"),
        (lambda: assignment.by_frequency([3, 1], kappa=np.inf),
         "kappa must be finite and >= 0, got inf"),
        *(
            (
                lambda split=split: assignment.by_frequency([3, 1], split=split),
                f"split must be a fraction below 1 or a whole number in 0..2, got {split}",
            )
            for split in (-1, 3, 1.5, np.nan, np.inf)
        ),
        (lambda: assignment.custom([1, 2]), "sign must be a list of -1, 0 and 1, got [1.0, 2.0]"),
        (lambda: assignment.custom(1), "sign must be a non-empty vector of numbers, got shape ()"),
        (lambda: assignment.custom([True, False]),
         "sign must be a vector of numbers known on the host, got list"),
        (lambda: assignment.custom([1, 1], [1, -1]),
         "multiplier must be finite and >= 0, got -1 at position 1"),
        (lambda: assignment.custom([1, 1], [1]),
         "multiplier must be 2 numbers, got [1.0]"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named_with_its_value(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared below)
        make()
    assert str(error.value) == message
