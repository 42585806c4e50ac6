"""What a perturbation does to every class: against slow NumPy loops and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lpa_jax
from lpa_jax import diagnostics, metrics, perturbations
from lpa_jax.diagnostics import Observation, agreement, class_geometry, observe
from lpa_jax.injection import StagedNetwork
from tests.helpers import toy

LABELS = np.array([0, 1, 1, 2, 0, 1], np.int32)  # class 3 is absent


@pytest.fixture(scope="module")
def network():
    return StagedNetwork(toy.NormalizedMLP(toy.CLASSES, dropout=0.5))


@pytest.fixture(scope="module")
def variables(network):
    return network.init(jax.random.key(0), toy.batch()["image"])


def observation(seed=0, **changes):
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(6, 2, 3)).astype(np.float32)
    after = before + rng.normal(size=before.shape).astype(np.float32)
    losses = rng.random((2, 6)).astype(np.float32)
    return Observation(before, after, *losses, None, None)._replace(**changes)


def test_class_geometry_is_the_mean_over_members_computed_one_by_one():
    seen = observation(sign=jnp.array([1.0, -1.0, 1.0, 0.0]), radius=jnp.arange(4.0))
    values = metrics.compute(class_geometry(seen, LABELS, toy.CLASSES))
    for c in range(3):
        members = np.flatnonzero(c == LABELS)
        mean = seen.before[members].mean(0).ravel()
        expected = {"norm_ratio": [], "cosine": [], "delta_norm": [], "loss_change": []}
        for i in members:
            before, after = seen.before[i].ravel(), seen.after[i].ravel()
            delta = after - before
            length = np.linalg.norm(delta)
            expected["norm_ratio"].append(np.linalg.norm(after) / np.linalg.norm(before))
            expected["cosine"].append(delta @ mean / length / np.linalg.norm(mean))
            expected["delta_norm"].append(length)
            expected["loss_change"].append(seen.loss_after[i] - seen.loss_before[i])
        for name, members_values in expected.items():
            np.testing.assert_allclose(values[name][c], np.mean(members_values), rtol=1e-5)
    assert values["sign"].tolist()[:3] == [1, -1, 1] and values["radius"].tolist()[:3] == [0, 1, 2]


def test_the_shift_of_the_logits_is_what_numpy_finds_class_by_class():
    before, after = np.random.default_rng(1).normal(size=(2, 6, toy.CLASSES)).astype(np.float32)
    after[2] = np.nan  # does not count
    seen = observation(logits_before=before, logits_after=after)
    mask = np.array([1, 1, 0, 1, 1, 1])
    values = metrics.compute(class_geometry(seen, LABELS, toy.CLASSES, mask=mask))

    def softmax(z):
        return np.exp(z) / np.exp(z).sum()

    def log_odds(z, c):
        return np.log(softmax(z)[c] / (1 - softmax(z)[c]))

    for c in range(3):
        members = [i for i in range(6) if LABELS[i] == c and mask[i]]
        shifts = np.array([after[i] - before[i] - (after[i] - before[i]).mean() for i in members])
        shared = np.square(shifts.mean(0)).sum() / np.square(shifts).sum(1).mean()
        gradient = np.mean([softmax(before[i]) for i in members], 0) - np.eye(toy.CLASSES)[c]
        cosine = shifts.mean(0) @ gradient
        cosine /= np.linalg.norm(shifts.mean(0)) * np.linalg.norm(gradient)
        change = np.mean([log_odds(after[i], c) - log_odds(before[i], c) for i in members])
        found = [values[name][c] for name in ("shared_shift", "lpl_cosine", "log_odds_change")]
        np.testing.assert_allclose(found, [shared, cosine, change], rtol=1e-4)
    still = seen._replace(logits_after=before)
    values = metrics.compute(class_geometry(still, LABELS, toy.CLASSES))
    assert np.isnan(values["shared_shift"]).all() and np.isnan(values["lpl_cosine"]).all()
    assert values["log_odds_change"].tolist()[:3] == [0, 0, 0]


@pytest.mark.parametrize("layer", ["hidden1", "logits"])
def test_one_shift_of_the_logits_is_shared_by_all_members_alone_at_the_logits(
    layer, network, variables
):
    lpa = {layer: lpa_jax.lpa(0.5, assignment=lpa_jax.all_positive())}
    seen = observe(network, variables, toy.batch(LABELS), lpa, rng=jax.random.key(1))[layer]
    values = metrics.compute(class_geometry(seen, LABELS, toy.CLASSES))
    shared = values["shared_shift"][[0, 1]]  # of class 2 there is a single member
    assert (shared > 0.9999).all() == (layer == "logits")
    assert values["shared_shift"][2] == pytest.approx(1)
    assert (values["log_odds_change"][:3] < 0).all() and (values["lpl_cosine"][:3] > 0).all()


def test_absent_classes_and_unstated_signs_are_nan():
    values = metrics.compute(class_geometry(observation(), LABELS, toy.CLASSES))
    assert all(np.isnan(values[name][3]) for name in values)
    assert np.isnan(values["sign"]).all() and np.isnan(values["radius"]).all()


def test_padding_is_not_counted():
    seen = observation()
    mask = np.array([1, 1, 1, 1, 0, 0])
    seen.after[4:] = np.nan
    padded = class_geometry(seen, LABELS, toy.CLASSES, mask=mask)
    cut = Observation(seen.before[:4], seen.after[:4], seen.loss_before[:4], seen.loss_after[:4],
                      None, None)  # fmt: skip
    toy.assert_trees_close(padded, class_geometry(cut, LABELS[:4], toy.CLASSES))


def test_an_empty_batch_and_a_loss_that_is_not_finite_are_refused(network, variables):
    lpa = {"hidden1": lpa_jax.lpa(0.1, assignment=lpa_jax.custom(toy.SIGN))}
    empty = {name: values[:0] for name, values in toy.batch(LABELS).items()}
    with pytest.raises(ValueError, match="batch must hold at least one example, got none"):
        observe(network, variables, empty, lpa, rng=jax.random.key(1))
    seen = observation()
    seen.loss_after[2] = np.nan
    with pytest.raises(ValueError, match="loss_after must be finite, got nan"):
        class_geometry(seen, LABELS, toy.CLASSES)
    class_geometry(seen, LABELS, toy.CLASSES, mask=np.array([1, 1, 0, 1, 1, 1]))  # padding


def test_examples_that_did_not_move_have_no_cosine():
    seen = observation()
    pairs = class_geometry(seen._replace(after=seen.before), LABELS, toy.CLASSES)
    assert pairs["cosine"][1].tolist() == [0, 0, 0, 0] and not pairs["delta_norm"][0].any()


def test_an_activation_of_zero_has_no_norm_ratio():
    seen = observation()
    before, after = seen.before.copy(), seen.after.copy()
    before[[1, 3]], after[1] = 0, 0  # of class 1 one of three, unmoved; of class 2 all, moved
    seen = seen._replace(before=before, after=after)
    ratio = metrics.compute(class_geometry(seen, LABELS, toy.CLASSES))["norm_ratio"]
    others = np.linalg.norm(after[[2, 5]].reshape(2, -1), axis=1)
    others /= np.linalg.norm(before[[2, 5]].reshape(2, -1), axis=1)
    assert ratio[1] == pytest.approx(others.mean(), rel=1e-5)
    assert np.isnan(ratio[2])


def test_observed_lpa_is_signed_bounded_and_shared_by_the_class(network, variables):
    batch = toy.batch(LABELS)
    lpa = lpa_jax.lpa(0.1, assignment=lpa_jax.custom(toy.SIGN))
    seen = observe(network, variables, batch, {"hidden1": lpa}, rng=jax.random.key(1))["hidden1"]
    values = metrics.compute(class_geometry(seen, LABELS, toy.CLASSES))
    present = [0, 1, 2]
    np.testing.assert_array_equal(values["sign"][present], np.array(toy.SIGN)[present])
    assert np.all(values["delta_norm"][present] <= values["radius"][present] * (1 + 1e-5))
    assert np.all(values["cosine"][present] * values["sign"][present] >= -1e-5)
    np.testing.assert_allclose(seen.delta[0], seen.delta[4], atol=1e-6)
    h = lpa_jax.encode(network, variables, batch["image"], "hidden1")
    np.testing.assert_allclose(seen.before, h, rtol=1e-5, atol=1e-6)


def test_a_layer_sees_the_one_below_perturbed(network, variables):
    batch = toy.batch(LABELS)
    shift = perturbations.stateless("shift", lambda site: (site.activation + 1.0, site.targets))
    both = {"input": shift, "hidden2": shift}
    seen = observe(network, variables, batch, both, rng=jax.random.key(1))
    h = lpa_jax.encode(network, variables, batch["image"] + 1.0, "hidden2")
    np.testing.assert_allclose(seen["hidden2"].before, h, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen["input"].loss_after, seen["hidden2"].loss_before, rtol=1e-5)


def test_a_perturbation_that_tells_the_label_changes_the_accuracy(network, variables):
    """At the logits, 100 for the label makes all correct; padding with label -1 does not count."""
    told = perturbations.stateless("told", lambda site: (100 * site.targets, site.targets))
    labels = np.where(np.arange(6) == 5, -1, LABELS)
    batch, rng = toy.batch(labels), jax.random.key(1)
    pairs = diagnostics.perturbation_effect(
        network, variables, {"logits": ()}, batch, perturbations={"logits": told},
        loss=lpa_jax.cross_entropy, rng=rng,
    )  # fmt: skip
    seen = observe(network, variables, batch, {"logits": told}, rng=rng, train=True)["logits"]
    right = np.argmax(seen.before, axis=1)[:5] == labels[:5]
    total, count = pairs["logits/accuracy_change/neutral"]
    assert (total, count) == (5 - right.sum(), 5) and not right.all()


def test_a_chain_tells_the_sign_of_its_member(network, variables):
    chained = lpa_jax.chain(
        lpa_jax.gaussian_noise(0.1), lpa_jax.lpa(0.1, assignment=lpa_jax.custom(toy.SIGN))
    )
    seen = observe(
        network, variables, toy.batch(LABELS), {"hidden1": chained}, rng=jax.random.key(1)
    )
    assert seen["hidden1"].sign.tolist() == [1.0, -1.0, 1.0, 0.0]


def geometry_of(ratio, change, sign):
    ratio, change, sign = (np.asarray(v, float) for v in (ratio, change, sign))
    return {"norm_ratio": ratio, "loss_change": change, "sign": sign,
            "delta_norm": np.where(np.isnan(ratio), np.nan, 1.0)}  # fmt: skip


def test_agreement_is_one_where_expansive_is_positive_and_contractive_negative():
    geometry = geometry_of([1.2, 0.8, np.nan], [0.3, -0.3, np.nan], [1, -1, np.nan])
    assert agreement(geometry) == pytest.approx((2, 1.0, 1.0, 1.0, 1.0))


def test_agreement_is_zero_where_expansion_lowers_the_loss():
    geometry = geometry_of([1.2, 0.8], [-0.3, 0.3], [1, -1])
    assert agreement(geometry) == pytest.approx((2, 0.0, 0.0, 1.0, -1.0))


def test_unsigned_methods_agree_with_no_sign():
    result = agreement(geometry_of([1.2, 0.8], [0.3, 0.2], [np.nan, 0]))
    assert np.isnan(result.sign_and_loss) and result.loss_and_norm == 0.5


@pytest.mark.parametrize("ratio", [[np.nan, np.nan], [1.2, np.nan]])
def test_agreement_of_fewer_than_two_moved_classes_is_refused(ratio):
    with pytest.raises(ValueError, match=r"needs at least 2 that are perturbed, got [01]$"):
        agreement(geometry_of(ratio, [0.1, 0.1], [1, 1]))


@pytest.mark.parametrize(
    ("labels", "mask", "message"),
    [
        (np.zeros(0, np.int32), None, r"labels must be a non-empty vector \[B\], got shape \(0,\)"),
        (LABELS[:5], None, "before must have one row for each of 5 labels"),
        (LABELS, np.ones(3), "mask must have one row for each of 6 labels"),
        (LABELS + 4, None, r"labels must be in 0\.\.3 or -1, got 4 at position 0"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(labels, mask, message):
    with pytest.raises(ValueError, match=message):
        class_geometry(observation(), labels, toy.CLASSES, mask)


def test_an_unknown_layer_is_refused_with_the_names(network, variables):
    with pytest.raises(ValueError, match=r"unknown layer 'hiden'.*input, hidden1, hidden2, logits"):
        observe(network, variables, toy.batch(), {"hiden": lpa_jax.lpa()}, rng=jax.random.key(0))
