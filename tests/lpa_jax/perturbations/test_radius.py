"""Radii by the loss change that they cause: found on a batch, or kept during training."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.images.data import ImageTask
from experiments.images.settings import Settings
from experiments.methods import build as assembly
from experiments.methods import search
from experiments.training import suggested_radii as radius_center
from lpa_jax import assignment, data, injection, models
from lpa_jax.diagnostics import observe, suggest_radius
from lpa_jax.losses import cross_entropy
from lpa_jax.perturbations import Site, lpa, lpl, radius_target, stateless
from lpa_jax.training.step import TrainState, lpa_step

CLASSES = 5
LABELS = np.array([0, 0, 1, 3, 1, 0, 4, 3], np.int32)  # class 2 is absent
SIGN = np.array([1.0, -1.0, 1.0, -1.0, 0.0])
TARGET = 0.1
RULE = assignment.custom(SIGN)
LOGITS_ARE_HIDDEN = injection.CutFunctions(lambda p, x: x, lambda p, h: h)
FREE = {"geometry": "free", "scale": "absolute", "assignment": RULE}


def group_changes(before, after, labels, sign):
    """Mean over the classes of each sign of s_c times the class's mean loss change, in NumPy."""
    change = {c: np.mean((after - before)[labels == c]) for c in np.unique(labels)}
    return [np.mean([s * change[c] for c in change if sign[c] == s]) for s in (1.0, -1.0)]


class Toy(NamedTuple):
    """A small MLP with LPA at its first hidden layer, trained for a while; compiled functions.

    Attributes:
      state: with fresh factors of the radius.
      batch: what it is trained on.
      step: (state, learning rate, radius) -> state.
      changes: (state, radius) -> loss change of the positive and the negative classes.
    """

    state: TrainState
    batch: dict[str, np.ndarray]
    step: Callable[..., TrainState]
    changes: Callable[..., list[float]]


@functools.cache
def toy():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES, dtype=np.int32), [24, 16, 12, 8, 4])
    images = rng.normal(size=(CLASSES, 8))[labels] + rng.normal(size=(labels.size, 8))
    batch = {"image": images.astype(np.float32), "label": labels}

    def perturbations(radius):
        return {"hidden1": lpa(radius, assignment=RULE, radius_target=TARGET)}

    @jax.jit
    def step(state, rate, radius):
        at_rate = state.replace(optimizer=optax.sgd(rate))
        new_state, _ = lpa_step(at_rate, batch, perturbations=perturbations(radius))
        return new_state.replace(optimizer=state.optimizer)

    @jax.jit
    def observed(state, radius):
        network, variables, states = state.network, state.variables, state.perturbation_state
        key = jax.random.key(0)
        seen = observe(network, variables, batch, perturbations(radius), rng=key, states=states)
        return seen["hidden1"].loss_before, seen["hidden1"].loss_after

    def changes(state, radius):
        before, after = (np.asarray(values) for values in observed(state, radius))
        return group_changes(before, after, labels, SIGN)

    model = models.MLP(CLASSES, hidden=(16, 12))
    state = TrainState.create(
        model, optax.sgd(0.1), jax.random.key(1), batch, perturbations(radius=0.1)
    )
    for _ in range(40):
        state = step(state, 0.1, 1e-9)
    fresh = {"hidden1": {"radius_scale": jnp.ones(2)}}
    return Toy(state.replace(perturbation_state=fresh), batch, step, changes)


def suggestion_for_toy(target, group="positive"):
    state, batch, *_ = toy()
    return suggest_radius(
        state.network,
        state.variables,
        batch,
        "hidden1",
        target=target,
        group=group,
        assignment=RULE,
    )


def linear_loss(logits, targets):
    return -jnp.sum(logits * targets, axis=-1)


@pytest.mark.parametrize("group", ["positive", "negative"])
@pytest.mark.parametrize("method", [lpa, lpl])
def test_suggestion_is_exact_where_the_loss_is_linear(method, group):
    images = np.random.default_rng(0).normal(size=(8, CLASSES)).astype(np.float32)
    batch = {"image": images, "label": LABELS}
    found = suggest_radius(
        LOGITS_ARE_HIDDEN,
        {"params": {}},
        batch,
        "hidden",
        target=3.0,
        group=group,
        method=method,
        loss=linear_loss,
        tolerance=1e-3,
        **FREE | {"scale": "relative"},
    )
    assert found == pytest.approx(3.0 / np.linalg.norm(images, axis=1).mean(), rel=2e-3)


@pytest.mark.parametrize(("group", "target"), [("positive", 0.5), ("negative", 0.1)])
def test_loss_change_at_the_suggestion_is_the_target(group, target):
    radius = suggestion_for_toy(target, group)
    changes = dict(zip(("positive", "negative"), toy().changes(toy().state, radius), strict=True))
    assert changes[group] == pytest.approx(target, rel=0.05)


def rises_and_falls(logits, targets):
    h = logits[:, 0]
    return h * jnp.exp(-h)


def jumps(logits, targets):
    h = logits[:, 0]
    return 1e-3 * h + jnp.where(h > 1.0, 1.0, 0.0)


def suggest_on_one_number(loss, **options):
    batch = {"image": np.zeros((1, 1), np.float32), "label": np.zeros(1, np.int32)}
    one_class = FREE | {"assignment": assignment.custom([1.0])}
    return suggest_radius(
        LOGITS_ARE_HIDDEN,
        {"params": {}},
        batch,
        "hidden",
        loss=loss,
        steps=1,
        **one_class | options,
    )


def test_smallest_of_several_radii_is_suggested():
    found = suggest_on_one_number(rises_and_falls, target=0.3, tolerance=1e-3)
    assert found == pytest.approx(0.4894, abs=2e-3)  # and again at 1.7813


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (rises_and_falls, {"target": 0.4},
         "not reached up to high=1000: .* 0.368 at most, at radius 1$"),
        (jumps, {"target": 0.5}, "jumps over it, to 1, at radius 1$"),
        (jumps, {"target": 0.5, "low": 2.0}, "low=2 must be smaller: the loss changes by 1 there"),
        (lambda z, t: jnp.log(1.0 - z[:, 0]) * -1.0, {"target": 50.0},
         "the loss must be finite, but changes by"),
        (rises_and_falls, {"group": "negative"}, "group='negative' has no class in the batch"),
        (lambda z, t: jnp.log(z[:, 0]), {}, "the loss must be finite, but is -inf without"),
        (lambda z, t: jnp.mean(z), {}, r"loss must return one value for each label, .*got \(\)"),
        (rises_and_falls, {"group": "neutral"}, "group must be one of positive, negative, got"),
        (rises_and_falls, {"target": 0.0}, "target must be finite and > 0, got 0.0"),
        (rises_and_falls, {"low": 10.0, "high": 1.0}, "low must be smaller than high"),
        (rises_and_falls, {"mode": "free"}, "mode must be 'cold' to suggest a radius, got 'free'"),
    ],
)  # fmt: skip
def test_suggestion_that_does_not_exist_is_refused(loss, options, message):
    with pytest.raises(ValueError, match=message):
        suggest_on_one_number(loss, **options)


def test_bad_batches_layers_and_methods_are_refused_a_suggestion():
    ask = functools.partial(suggest_radius, LOGITS_ARE_HIDDEN, {"params": {}})
    batch = {"image": np.zeros((2, 3), np.float32), "label": np.array([0, 3])}
    good = batch | {"label": np.array([0, 1])}
    empty = {name: values[:0] for name, values in good.items()}
    unsigned = stateless("shift", lambda site: (site.activation + 1.0, site.targets))
    for arguments, options, message in (
        ((good, "stage9"), {}, "unknown layer 'stage9'; the injection points are: input, hidden,"),
        ((batch, "hidden"), {}, "labels must be in 0..2 or -1, got 3 at position 1"),
        ((empty, "hidden"), {}, "batch must hold at least one example"),
        ((good, "hidden"), {"method": lambda r: unsigned}, "classes a sign, shift does not"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(*arguments, **options)


def site_over(slice_of=slice(None), axis_name=None):
    rng = np.random.default_rng(3)
    activation, weights = rng.normal(size=(8, 6)), rng.normal(size=(6, CLASSES))
    return Site(
        activation=jnp.asarray(activation[slice_of], jnp.float32),
        targets=jax.nn.one_hot(LABELS, CLASSES)[slice_of],
        labels=jnp.asarray(LABELS)[slice_of],
        decode=lambda h: h @ jnp.asarray(weights, jnp.float32),
        loss=cross_entropy,
        rng=jax.random.key(0),
        axis_name=axis_name,
    )


def apply(perturbation, state, site):
    return jax.jit(lambda state: perturbation.apply(state, site))(state)


def state_for(perturbation, scale=(1.0, 1.0)):
    state = perturbation.init(jax.ShapeDtypeStruct((8, 6), jnp.float32), CLASSES)
    state = {name: jnp.ones_like(value) for name, value in state.items()}  # a carried delta, too
    return state | {"radius_scale": jnp.asarray(scale, jnp.float32)}


def test_without_a_target_state_and_diagnostics_are_as_ever():
    perturbation = lpa(0.1, assignment=RULE)
    state = perturbation.init(jax.ShapeDtypeStruct((8, 6), jnp.float32), CLASSES)
    applied = apply(perturbation, state, site_over())
    assert state == applied.state == {}
    assert set(applied.aux) == {"sign", "radius", "present"}


@pytest.mark.parametrize(
    ("mode", "shape"), [("cold", "full"), ("carry", "channel"), ("free", "channel")]
)
def test_scale_follows_the_loss_change_of_each_sign_group(mode, shape):
    scale = np.array([2.0, 0.5], np.float32)
    perturbation = lpa(
        0.3, mode=mode, shape=shape, assignment=RULE, negative_scale=0.5, radius_target=TARGET
    )
    site = site_over()
    applied = apply(perturbation, state_for(perturbation, scale), site)

    def losses(h):
        return np.asarray(cross_entropy(site.decode(h), site.targets), np.float64)

    before, after = losses(site.activation), losses(applied.activation)
    changes = group_changes(before, after, LABELS, SIGN)
    negative_loss = np.mean([before[c == LABELS].mean() for c in (1, 3)])
    wanted = np.array([TARGET, min(0.5 * TARGET, negative_loss / 2)])
    expected = scale * np.exp(0.05 * np.clip(np.log(wanted / changes), -1, 1))
    np.testing.assert_allclose(applied.state["radius_scale"], expected, rtol=1e-4)
    assert np.all(expected != scale)
    np.testing.assert_array_equal(applied.aux["radius_scale"], scale)
    mean_norm = np.linalg.norm(site.activation, axis=1).mean()
    factors = np.where(SIGN > 0, 2.0, np.where(SIGN < 0, 0.5 * 0.5, 0)) * np.isin(
        [*range(5)], LABELS
    )
    np.testing.assert_allclose(applied.aux["radius"], 0.3 * mean_norm * factors, rtol=1e-5)


def test_negative_target_is_at_most_half_of_the_loss():
    perturbation = lpa(1e-3, assignment=RULE, radius_target=100.0)
    site = site_over()
    state = state_for(perturbation)
    before = np.asarray(cross_entropy(site.decode(site.activation), site.targets))
    half = np.mean([before[c == LABELS].mean() for c in (1, 3)]) / 2
    applied = apply(perturbation, state, site)
    assert half < 100.0
    assert applied.state["radius_scale"].tolist() == pytest.approx([np.exp(0.05)] * 2)


@pytest.mark.parametrize(
    ("scale", "change", "wanted", "expected"),
    [
        (1.0, 0.1, 0.1, 1.0),
        (1.0, 0.1, 100.0, np.exp(0.05)),
        (1.0, 100.0, 0.1, np.exp(-0.05)),
        (1.0, 0.0, 0.1, np.exp(0.05)),
        (1.0, -0.1, 0.1, np.exp(0.05)),
        (1.0, np.nan, 0.1, np.exp(-0.05)),
        (1.0, np.inf, 0.1, np.exp(-0.05)),
        (1.0, 0.1, 0.0, 1.0),
        (100.0, 0.1, 1.0, 100.0),
        (0.01, 1.0, 0.1, 0.01),
    ],
)
def test_scale_grows_shrinks_and_stays_in_its_bounds(scale, change, wanted, expected):
    arguments = (jnp.full(2, value, jnp.float32) for value in (scale, change, wanted))
    new = radius_target.next_scale(*arguments, exists=jnp.array([True, False]))
    np.testing.assert_allclose(new, [expected, scale], rtol=1e-6)


def test_devices_share_the_scale_of_the_global_batch():
    perturbation = lpa(0.3, assignment=RULE, radius_target=TARGET)
    state = state_for(perturbation)
    halves = jax.tree.map(lambda a, b: jnp.stack([a, b]), *(
        (site.activation, site.targets, site.labels)
        for site in (site_over(slice(4)), site_over(slice(4, None)))
    ))  # fmt: skip

    def on_device(activation, targets, labels):
        whole = site_over(axis_name="devices")
        site = Site(activation, targets, labels, whole.decode, whole.loss, whole.rng, "devices")
        return perturbation.apply(state, site).state["radius_scale"]

    scales = jax.jit(jax.vmap(on_device, axis_name="devices"))(*halves)
    expected = apply(perturbation, state, site_over()).state["radius_scale"]
    np.testing.assert_array_equal(scales[0], scales[1])
    np.testing.assert_allclose(scales[0], expected, rtol=1e-6)
    assert np.all(expected != 1.0)


@pytest.mark.parametrize("off", [0.1, 10.0])
def test_radius_off_by_ten_is_put_right(off):
    state, _, step, changes = toy()
    radius = off * suggestion_for_toy(TARGET)
    assert abs(np.log(changes(state, radius)[0] / TARGET)) > 1
    for _ in range(160):
        state = step(state, 0.0, radius)
    assert changes(state, radius) == pytest.approx([TARGET, TARGET], rel=0.05)
    for _ in range(40):
        state = step(state, 0.05, radius)
    assert changes(state, radius)[0] == pytest.approx(TARGET, rel=0.3)


def test_measuring_the_cold_mode_costs_no_pass():
    batch = {"image": np.zeros((16, 32), np.float32), "label": np.zeros(16, np.int32)}

    def flops(target):
        perturbations = {"hidden1": lpa(assignment=assignment.all_positive(), radius_target=target)}
        state = TrainState.create(
            models.MLP(4, hidden=(32, 64, 64)), optax.sgd(0.1), jax.random.key(0), batch,
            perturbations,
        )  # fmt: skip
        step = jax.jit(functools.partial(lpa_step, perturbations=perturbations))
        return step.lower(state, batch).compile().cost_analysis()["flops"]

    assert flops(TARGET) < 1.02 * flops(None)


def test_an_image_that_is_not_finite_is_named_also_where_it_leaves_no_class_with_a_sign():
    model = models.MLP(num_classes=3, hidden=(8,))
    batch = {"image": jnp.ones((6, 4)).at[0, 0].set(jnp.nan), "label": jnp.arange(6) % 3}
    state = TrainState.create(model, optax.sgd(0.1), jax.random.key(0), batch, {})
    with pytest.raises(ValueError, match="the loss must be finite, but is nan without perturb"):
        suggest_radius(
            model, state.variables, batch, "hidden1", target=0.1,
            assignment=assignment.by_confidence(),
        )  # fmt: skip


def test_target_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"radius_target must be finite and > 0, got 0"):
        lpa(radius_target=0)


def test_target_is_an_option_of_the_method_and_may_be_traced():
    options = {"lpa.radius_target": 0.3, "lpa.radius": 0.1}
    assert set(assembly.traceable("lpa", options)) == set(options)
    parts = assembly.assemble("lpa", options, layers=("input", "pool", "logits"), layer="pool",
                              counts=[3, 2])  # fmt: skip
    state = parts.perturbations["pool"].init(jax.ShapeDtypeStruct((4, 6), jnp.float32), 2)
    assert state["radius_scale"].tolist() == [1.0, 1.0]


def test_search_looks_around_the_suggested_radius(monkeypatch):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), [40, 20, 10])
    images = rng.normal(size=(3, 4, 4, 1))[labels] + rng.normal(size=(70, 4, 4, 1))
    train = data.Dataset("toy", images.astype(np.float32), labels, num_classes=3)
    task = ImageTask(train, train, data.Normalization.fit(train.images), np.arange(70))
    found = {}

    def spy(network, variables, batch, layer, **options):
        assert layer not in found  # measured once
        found[layer] = suggest_radius(network, variables, batch, layer, **options)
        return found[layer]

    monkeypatch.setattr(radius_center, "suggest_radius", spy)
    flags = {"layer": "hidden3", "lpa.mode": "free"}
    suggestions = radius_center.Suggestions(Settings(epochs=10), task, seed=0, explicit=flags)
    spaces = {part: search.part_space(part, ["hidden1"])["radius"] for part in ("lpa", "lpl")}
    rest = {"lpa.negative_scale": 0.3, "lpa.layer": "hidden1", "learning_rate": 0.1}
    for place, factor in ((0.0, 0.1), (0.5, 1.0), (1.0, 10.0)):
        radii = {f"{p}.radius": s.low * (s.high / s.low) ** place for p, s in spaces.items()}
        moved = suggestions.recentred("lpa+lpl", rest | radii)
        expected = {
            "lpa.radius": pytest.approx(factor * found["hidden3"], rel=5e-3),
            "lpl.radius": pytest.approx(factor * found["logits"], rel=5e-3),
        }
        assert moved == rest | expected
