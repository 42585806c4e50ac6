"""LPA and LPL as perturbations: the three modes, the state they carry, radii and contracts."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from lpa_jax import assignment, pgd
from lpa_jax.perturbations import Feedback, Site, lpa, lpl

CLASSES, FEATURES = 4, (2, 3)
LABELS = np.array([0, 1, 1, 3, 0, 3], np.int32)  # class 2 is absent
SIGN = np.array([1.0, -1.0, 1.0, -1.0])
MULTIPLIER = np.array([1.0, 0.5, 2.0, 1.5])
CUSTOM = assignment.custom(SIGN, MULTIPLIER)
MODES = ("cold", "carry", "free")


class Batch:
    """One batch at the injection point, with a random network above it."""

    def __init__(self, seed=0, labels=LABELS, num_classes=CLASSES, feature_shape=FEATURES):
        self.network = reference.random_network(
            np.random.default_rng(9), feature_shape, num_classes
        )
        rng = np.random.default_rng(seed)
        self.labels, self.num_classes = np.asarray(labels), num_classes
        self.activations = rng.normal(size=(len(labels), *feature_shape))
        self.targets = 0.9 * np.eye(num_classes)[self.labels] + 0.1 / num_classes

    @property
    def logits(self):
        return np.array([reference.logits(self.network, h) for h in self.activations])

    def numpy_gradient(self, i, h):
        return reference.loss_gradient(self.network, h, self.targets[i])

    def site(self, dtype=jnp.float64, network=None):
        network = network or self.network
        return Site(
            activation=jnp.asarray(self.activations, dtype),
            targets=jnp.asarray(self.targets, dtype),
            labels=jnp.asarray(self.labels),
            decode=lambda h: reference.jax_logits(network, h),
            loss=reference.jax_cross_entropy,
            rng=jax.random.key(0),
        )

    def init(self, perturbation, dtype=jnp.float64):
        h = jax.ShapeDtypeStruct(self.activations.shape, dtype)
        return perturbation.init(h, self.num_classes)

    def present(self):
        return np.isin(np.arange(self.num_classes), self.labels)

    def class_mean(self, c, shape="full"):
        mean = self.activations[self.labels == c].mean(axis=0)
        return mean if shape == "full" else mean.mean(axis=0, keepdims=True)

    def seen(self, applied):
        """What the perturbation added to every example."""
        return np.asarray(applied.activation, np.float64) - self.activations


class LogitBatch(Batch):
    """One batch at the injection point `logits`, with hard targets."""

    def __init__(self, seed=0, labels=LABELS):
        super().__init__(seed, labels, feature_shape=(CLASSES,))
        self.targets = np.eye(CLASSES)[self.labels]
        # Where the true class leads, a half-space would cut what LPL does.
        self.activations += 2.0 * self.targets

    @property
    def logits(self):
        return self.activations

    def site(self, dtype=jnp.float64):
        return Site(
            activation=jnp.asarray(self.activations, dtype),
            targets=jnp.asarray(self.targets, dtype),
            labels=jnp.asarray(self.labels),
            decode=lambda h: h,
            loss=reference.jax_cross_entropy,
            rng=jax.random.key(0),
        )


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def confidence_signs(confidence, present):
    return np.where(present, np.sign(confidence[present].mean() - confidence), 0)


def expected_scale(batch, scale, norm, shape):
    if scale == "absolute":
        return 1.0
    sizes = []
    for h in batch.activations:
        h = h if shape == "full" else h.mean(axis=0)
        sizes.append(reference.size(h, norm))
    return np.mean(sizes)


ZERO_STRENGTH = {
    "radius 0": {"radius": 0.0},
    "steps 0": {"steps": 0},
    "all signs 0": {"assignment": assignment.custom(np.zeros(CLASSES))},
    "negative_scale 0": {"assignment": assignment.all_negative(), "negative_scale": 0.0},
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("zero", "mode"),
    [
        *(("radius 0", mode) for mode in MODES),
        ("steps 0", "cold"),
        ("steps 0", "carry"),
        *(("all signs 0", mode) for mode in MODES),
        ("negative_scale 0", "cold"),
    ],
)
def test_contract_02_zero_strength_leaves_the_activation_bitwise_alone(zero, mode, dtype):
    perturbation = lpa(mode=mode, **ZERO_STRENGTH[zero])
    batch = Batch()
    batch.activations[:, 0, 0] = -0.0  # ReLU and GELU leave such zeros
    state = batch.init(perturbation, dtype)

    @jax.jit
    def two_visits(state):
        site = batch.site(dtype)
        first = perturbation.apply(state, site)
        state = first.state
        if perturbation.update is not None:
            feedback = Feedback(jnp.ones_like(site.activation), site.decode(site.activation))
            state = perturbation.update(state, site, feedback)
        return first.activation, perturbation.apply(state, site).activation

    for activation in two_visits(state):
        assert activation.dtype == dtype
        assert (
            np.asarray(activation).tobytes() == np.asarray(batch.site(dtype).activation).tobytes()
        )


@pytest.mark.parametrize("mode", MODES)
def test_contract_03_members_of_a_class_see_one_delta(mode, x64):
    perturbation, batch = lpa(0.5, mode=mode, assignment=CUSTOM), Batch()
    state = batch.init(perturbation)
    if mode == "free":
        state = {**state, "delta": jnp.ones((CLASSES, *FEATURES))}
    applied = perturbation.apply(state, batch.site())
    seen = batch.seen(applied)
    for c in np.unique(LABELS):
        members = seen[batch.labels == c]
        np.testing.assert_allclose(members, np.broadcast_to(members[0], members.shape), rtol=1e-9)
        assert np.any(members)
    np.testing.assert_array_equal(applied.targets, batch.targets)


@pytest.mark.parametrize("mode", MODES)
def test_contract_05_no_gradient_flows_through_delta_signs_or_radii(mode):
    perturbation = lpa(0.5, mode=mode, assignment=assignment.by_confidence(kappa=1.0))
    batch = Batch()
    site = batch.site(jnp.float32)
    state = batch.init(perturbation, jnp.float32)
    state = {k: jnp.ones_like(v) for k, v in state.items()} if state else state
    weights = jax.tree.map(jnp.float32, batch.network)

    def everything(weights, h):
        here = dataclasses.replace(batch.site(jnp.float32, network=weights), activation=h)
        applied = perturbation.apply(state, here)
        return applied.activation, (applied.aux["radius"], applied.aux["sign"], applied.state)

    @jax.jit
    def pulled_back(weights, h):
        (moved, rest), pull = jax.vjp(everything, weights, h)
        cotangents = jax.tree.map(
            lambda x: (
                jnp.ones_like(x)
                if jnp.issubdtype(x.dtype, jnp.floating)
                else np.zeros(x.shape, jax.dtypes.float0)
            ),
            rest,
        )
        return moved, pull((moved, cotangents))

    moved, (by_weights, by_activation) = pulled_back(weights, site.activation)
    assert not any(np.any(leaf) for leaf in by_weights)
    np.testing.assert_array_equal(by_activation, moved)  # h~ = h + constant
    assert np.any(moved != site.activation) or mode == "free"


LPL_CASES = {
    "custom": (CUSTOM, SIGN, MULTIPLIER),
    "frequency": (
        assignment.by_frequency([40, 10, 30, 20], split=2, kappa=0.3),
        np.array([-1.0, 1.0, -1.0, 1.0]),
        1 + 0.3 * np.array([1.0, 1.0, 0.75, 0.5]),
    ),
    "confidence": (assignment.by_confidence(kappa=0.3), None, None),
}


@pytest.mark.parametrize("case", LPL_CASES)
@pytest.mark.parametrize(("radius", "steps"), [(1.0, 3), (0.7, 1), (5.0, 5)])
def test_contract_08_lpl_is_the_softmax_minus_onehot_iteration(case, radius, steps, x64):
    rule, sign, multiplier = LPL_CASES[case]
    batch = LogitBatch()
    if case == "confidence":
        confidence = reference.class_confidence(batch.logits, batch.labels)
        tau = confidence[batch.present()].mean()
        sign = confidence_signs(confidence, batch.present())
        multiplier = 1 + 0.3 * np.abs(tau - confidence)
    perturbation = lpl(radius, steps, assignment=rule, negative_scale=0.3)
    applied = perturbation.apply(batch.init(perturbation), batch.site())
    expected = reference.logit_perturbation(
        batch.logits,
        batch.labels,
        sign=sign,
        radius=radius * multiplier * np.where(sign < 0, 0.3, 1.0),
        steps=steps,
        step_size=1.5,
    )
    np.testing.assert_allclose(batch.seen(applied), expected[LABELS], rtol=1e-9, atol=1e-14)


def test_lpl_is_lpa_with_the_settings_of_lpl(x64):
    batch = LogitBatch()
    settings = {"mode": "cold", "geometry": "free", "scale": "absolute"}
    for arguments in ({"radius": 1.0}, {"radius": 2.0, "steps": 2, "negative_scale": 0.5}):
        as_lpl, as_lpa = lpl(**arguments), lpa(**arguments, **settings)
        np.testing.assert_array_equal(
            as_lpl.apply(batch.init(as_lpl), batch.site()).activation,
            as_lpa.apply(batch.init(as_lpa), batch.site()).activation,
        )
    assert (as_lpl.name, as_lpa.name) == ("lpl", "lpa")


OPTIONS = list(itertools.product(pgd.GEOMETRIES, pgd.NORMS, pgd.SHAPES))


@pytest.mark.parametrize(("geometry", "norm", "shape"), OPTIONS)
def test_cold_is_class_perturbation_with_the_same_sign_and_radius(geometry, norm, shape, x64):
    options = {"geometry": geometry, "norm": norm, "shape": shape}
    batch, perturbation = Batch(), lpa(0.5, assignment=CUSTOM, **options)
    state = batch.init(perturbation)
    assert not state
    applied = perturbation.apply(state, batch.site())
    np.testing.assert_array_equal(applied.aux["sign"], np.where(batch.present(), SIGN, 0))
    delta = pgd.class_perturbation(
        lambda h: batch.site().losses_and_logits(h)[0],
        jnp.asarray(batch.activations),
        jnp.asarray(LABELS),
        sign=SIGN,
        radius=applied.aux["radius"],
        **options,
    )
    np.testing.assert_allclose(
        batch.seen(applied),
        np.broadcast_to(delta, (CLASSES, *FEATURES))[LABELS],
        rtol=1e-9,
        atol=1e-12,
    )


def three_visits():
    """Class 0 misses the second visit, class 2 comes late, class 3 misses the last one."""
    for seed, labels in enumerate(([0, 1, 1, 3, 0, 3], [1, 1, 2, 3, 1, 2], [0, 1, 2, 2, 0, 0])):
        yield Batch(seed, np.array(labels, np.int32))


@pytest.mark.parametrize(("geometry", "norm", "shape"), OPTIONS)
def test_carry_is_class_perturbation_from_the_last_appearance(geometry, norm, shape, x64):
    options = {"geometry": geometry, "norm": norm, "shape": shape, "step_size": 0.8}
    perturbation = lpa(0.5, mode="carry", assignment=CUSTOM, **options)
    state = Batch().init(perturbation)
    table = np.zeros(state["delta"].shape)
    for batch in three_visits():
        applied = perturbation.apply(state, batch.site())
        rows = reference.class_perturbation(
            batch.numpy_gradient,
            batch.activations,
            batch.labels,
            sign=SIGN,
            radius=np.asarray(applied.aux["radius"]),
            steps=1,
            initial=table,
            **options,
        )
        for c in np.unique(batch.labels):
            table[c] = rows[c]
        np.testing.assert_allclose(applied.state["delta"], table, rtol=1e-9, atol=1e-12)
        seen = np.broadcast_to(table, (CLASSES, *FEATURES))[batch.labels]
        np.testing.assert_allclose(batch.seen(applied), seen, rtol=1e-9, atol=1e-12)
        absent = ~batch.present()
        np.testing.assert_array_equal(applied.state["delta"][absent], state["delta"][absent])
        state = applied.state


@pytest.mark.parametrize(("geometry", "norm", "shape"), OPTIONS)
def test_free_is_one_ascent_step_with_the_gradient_of_the_training_pass(geometry, norm, shape, x64):
    options = {"geometry": geometry, "norm": norm, "shape": shape, "step_size": 0.8}
    perturbation = lpa(0.5, mode="free", assignment=CUSTOM, **options)
    state = Batch().init(perturbation)
    table = np.zeros(state["delta"].shape)
    for batch in three_visits():
        site = batch.site()
        applied = perturbation.apply(state, site)
        np.testing.assert_array_equal(applied.state["delta"], state["delta"])
        known = {"sign": SIGN, "radius": np.asarray(applied.aux["radius"]), **options}
        arguments = (batch.activations, batch.labels)
        # The training pass sees the carried delta, projected for this batch.
        before = reference.class_perturbation(None, *arguments, steps=0, initial=table, **known)
        seen = np.broadcast_to(before, (CLASSES, *FEATURES))[batch.labels]
        np.testing.assert_allclose(batch.seen(applied), seen, rtol=1e-9, atol=1e-12)
        gradient = jax.grad(lambda h, site=site: jnp.sum(site.losses_and_logits(h)[0]))(
            applied.activation
        )
        feedback = Feedback(gradient, site.decode(applied.activation))
        blind = dataclasses.replace(site, decode=None)
        state = perturbation.update(applied.state, blind, feedback)
        after = reference.class_perturbation(
            batch.numpy_gradient, *arguments, steps=1, initial=table, **known
        )
        absent = ~batch.present()
        np.testing.assert_array_equal(state["delta"][absent], applied.state["delta"][absent])
        for c in np.unique(batch.labels):
            table[c] = after[c]
        np.testing.assert_allclose(state["delta"], table, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["cold", "carry"])
def test_confidence_is_read_where_nothing_is_perturbed(mode, x64):
    perturbation, batch = lpa(0.5, mode=mode, geometry="free"), Batch()
    state = batch.init(perturbation)
    if mode == "carry":
        state = {"delta": 10.0 * jnp.ones_like(state["delta"])}
    aux = perturbation.apply(state, batch.site()).aux
    confidence = reference.class_confidence(batch.logits, batch.labels)
    np.testing.assert_array_equal(aux["sign"], confidence_signs(confidence, batch.present()))


@pytest.mark.parametrize("ema", [0.0, 0.75])
def test_free_learns_the_confidence_of_the_training_pass_and_steps_with_it(ema, x64):
    perturbation = lpa(0.5, mode="free", assignment=assignment.by_confidence(ema=ema))
    state = Batch().init(perturbation)
    table = np.zeros((CLASSES, *FEATURES))
    confidence, known = np.zeros(CLASSES), np.zeros(CLASSES, bool)
    rng = np.random.default_rng(0)
    for batch in three_visits():
        site, present = batch.site(), batch.present()
        applied = perturbation.apply(state, site)
        # Before the training pass, only what earlier visits showed is known.
        usable = present & known
        expected = confidence_signs(confidence, usable) if usable.any() else np.zeros(CLASSES)
        np.testing.assert_array_equal(applied.aux["sign"], expected)
        if not known.any():
            np.testing.assert_array_equal(applied.activation, batch.activations)

        z, gradient = (rng.normal(size=(6, *shape)) for shape in ((CLASSES,), FEATURES))
        feedback = Feedback(jnp.asarray(gradient), jnp.asarray(z))
        state = perturbation.update(applied.state, site, feedback)
        shown = reference.class_confidence(z, batch.labels)
        smoothed = np.where(known, ema * confidence + (1 - ema) * shown, shown)
        confidence = np.where(present, smoothed, confidence)
        known |= present
        np.testing.assert_allclose(state["confidence"], confidence, rtol=1e-5)
        np.testing.assert_array_equal(state["known"], known)

        sign = confidence_signs(confidence, present)
        rows = reference.class_perturbation(
            lambda i, h, gradient=gradient: gradient[i],
            batch.activations,
            batch.labels,
            sign=sign,
            radius=np.full(CLASSES, 0.5 * expected_scale(batch, "relative", "l2", "full")),
            steps=1,
            initial=table,
        )
        table = np.where(present[:, None, None], rows, table)
        np.testing.assert_allclose(state["delta"], table, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", pgd.NORMS)
@pytest.mark.parametrize("shape", pgd.SHAPES)
def test_carried_delta_is_projected_for_the_class_mean_of_this_batch(norm, shape, x64):
    perturbation = lpa(0.1, mode="free", assignment=CUSTOM, norm=norm, shape=shape)
    batch = Batch(3)
    state = batch.init(perturbation)
    rows = [-s * batch.class_mean(c, shape) if c in LABELS else 0 for c, s in enumerate(SIGN)]
    noise = np.random.default_rng(0).normal(size=state["delta"].shape)
    outside = 5.0 * noise + np.array([np.broadcast_to(r, noise.shape[1:]) for r in rows])
    applied = perturbation.apply({"delta": jnp.asarray(outside)}, batch.site())
    for i, c in enumerate(LABELS):
        added = batch.seen(applied)[i]
        row = added if shape == "full" else added[:1]
        assert reference.size(row, norm) <= applied.aux["radius"][c] * (1 + 1e-9)
        assert SIGN[c] * np.sum(row * batch.class_mean(c, shape)) >= -1e-12
        assert np.any(row)


@pytest.mark.parametrize("geometry", ["signed", "free"])
@pytest.mark.parametrize("shape", pgd.SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_more_classes_than_examples_change_nothing_but_the_size_of_the_table(
    mode, shape, geometry, x64
):
    num_classes = 50
    labels = np.array([49, 7, 7, 0, 49, 31], np.int32)
    batch = Batch(0, labels, num_classes)
    rng = np.random.default_rng(5)
    sign = rng.choice([-1.0, 1.0], size=num_classes)
    options = {"geometry": geometry, "shape": shape}
    rule = assignment.custom(sign, rng.uniform(0.5, 2.0, num_classes))
    perturbation = lpa(0.5, mode=mode, assignment=rule, **options)
    site, state = batch.site(), batch.init(perturbation)
    initial = None
    if mode != "cold":
        initial = jnp.asarray(rng.normal(size=state["delta"].shape))
        state = {"delta": initial}
    applied = perturbation.apply(state, site)
    delta = pgd.class_perturbation(
        lambda h: site.losses_and_logits(h)[0],
        site.activation,
        site.labels,
        sign=sign,
        radius=applied.aux["radius"],
        steps={"cold": 3, "carry": 1, "free": 0}[mode],
        initial=initial,
        **options,
    )
    seen = np.broadcast_to(delta, (num_classes, *FEATURES))[labels]
    np.testing.assert_allclose(batch.seen(applied), seen, rtol=1e-9, atol=1e-12)
    if mode == "carry":
        table = np.where(batch.present()[:, None, None], delta, initial)
        np.testing.assert_allclose(applied.state["delta"], table, rtol=1e-9, atol=1e-12)
    if mode == "free":
        gradient = jax.grad(lambda h: jnp.sum(site.losses_and_logits(h)[0]))(applied.activation)
        updated = perturbation.update(applied.state, site, Feedback(gradient, jnp.zeros((6, 50))))
        after = reference.class_perturbation(
            batch.numpy_gradient,
            batch.activations,
            labels,
            sign=sign,
            radius=np.asarray(applied.aux["radius"]),
            steps=1,
            initial=np.asarray(initial),
            **options,
        )
        table = np.where(batch.present()[:, None, None], after, initial)
        np.testing.assert_allclose(updated["delta"], table, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("mode", "num_classes"), [("cold", CLASSES), ("free", 50)])
def test_a_batch_spread_over_a_mapped_axis_is_one_batch(mode, num_classes):
    # Class 1 is on both shards, class 3 on the second only.
    batch = Batch(2, np.array([0, 1, 0, 1, 3, 3], np.int32), num_classes)
    rule = assignment.by_confidence(kappa=0.5, ema=0.5)
    perturbation = lpa(0.5, mode=mode, assignment=rule)
    rng = np.random.default_rng(0)
    state = batch.init(perturbation, jnp.float32)
    state["confidence"] = jnp.asarray(rng.uniform(size=num_classes), jnp.float32)
    state["known"] = jnp.ones(num_classes, bool)
    if mode != "cold":
        state["delta"] = jnp.asarray(rng.normal(size=state["delta"].shape), jnp.float32)
    site = batch.site(jnp.float32)

    def visit(h, targets, labels, axis_name=None):
        arrays = {"activation": h, "targets": targets, "labels": labels, "axis_name": axis_name}
        here = dataclasses.replace(site, **arrays)
        applied = perturbation.apply(state, here)
        after = applied.state
        if mode == "free":
            feedback = Feedback(applied.activation, here.decode(applied.activation))
            after = perturbation.update(after, here, feedback)
        return applied.activation, (after, dict(applied.aux))

    arrays = (site.activation, site.targets, site.labels)
    shards = [a.reshape(2, 3, *a.shape[1:]) for a in arrays]
    mapped = jax.vmap(lambda *a: visit(*a, axis_name="i"), axis_name="i")
    activation, rest = jax.jit(mapped)(*shards)
    whole, expected = jax.jit(visit)(*arrays)
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(activation.reshape(whole.shape), whole, **close)
    for shard in range(2):
        on_shard = jax.tree.map(lambda leaf, shard=shard: leaf[shard], rest)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), on_shard, expected)


@pytest.mark.parametrize("scale", ["relative", "absolute"])
@pytest.mark.parametrize("norm", pgd.NORMS)
@pytest.mark.parametrize("shape", pgd.SHAPES)
def test_radius_is_radius_times_scale_times_multiplier_times_negative_scale(
    scale, norm, shape, x64
):
    batch = Batch(4)
    perturbation = lpa(
        0.2, assignment=CUSTOM, negative_scale=0.3, scale=scale, norm=norm, shape=shape
    )
    aux = perturbation.apply(batch.init(perturbation), batch.site()).aux
    expected = 0.2 * MULTIPLIER * np.where(SIGN < 0, 0.3, 1.0)
    expected *= expected_scale(batch, scale, norm, shape) * batch.present()
    np.testing.assert_allclose(aux["radius"], expected, rtol=1e-6)
    np.testing.assert_array_equal(aux["present"], batch.present())


@pytest.mark.parametrize(
    ("feature_shape", "shape", "row"),
    [
        ((8, 8, 16), "full", (8, 8, 16)),
        ((8, 8, 16), "channel", (1, 1, 16)),
        ((5, 16), "channel", (1, 16)),
        ((16,), "channel", (16,)),
        ((), "full", ()),
    ],
)
def test_the_carried_table_has_one_row_a_class(feature_shape, shape, row):
    for dtype, mode in itertools.product((jnp.float32, jnp.bfloat16), ("carry", "free")):
        perturbation = lpa(mode=mode, shape=shape, assignment=assignment.all_positive())
        state = perturbation.init(jax.ShapeDtypeStruct((32, *feature_shape), dtype), 10)
        assert list(state) == ["delta"]
        assert state["delta"].shape == (10, *row)
        assert state["delta"].dtype == jnp.float32
        assert not np.any(state["delta"])


def test_what_is_remembered_besides_delta():
    def names(**options):
        perturbation = lpa(**options)
        return set(perturbation.init(jax.ShapeDtypeStruct((2, 3), jnp.float32), CLASSES))

    smoothed = assignment.by_confidence(ema=0.5)
    assert names() == set()
    assert names(assignment=smoothed) == {"confidence", "known"}
    assert names(mode="carry") == {"delta"}
    assert names(mode="carry", assignment=smoothed) == {"delta", "confidence", "known"}
    assert names(mode="free") == {"delta", "confidence", "known"}
    assert [lpa(mode=mode).update is not None for mode in MODES] == [False, False, True]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lpa, {"radius": -0.1}, "radius must be finite and >= 0, got -0.1"),
        (lpa, {"radius": np.inf}, "radius must be finite and >= 0, got inf"),
        (lpa, {"negative_scale": -1.0}, "negative_scale must be finite and >= 0, got -1.0"),
        (lpa, {"mode": "warm"}, "mode must be one of cold, carry, free, got 'warm'"),
        (lpa, {"scale": "rms"}, "scale must be one of relative, absolute, got 'rms'"),
        (lpa, {"steps": -1}, "steps must be a whole number >= 0, got -1"),
        (lpa, {"step_size": 0.0}, "step_size must be finite and > 0, got 0.0"),
        (lpa, {"geometry": "cone"}, "geometry must be one of signed, free, flipped, got 'cone'"),
        (lpa, {"shape": "row"}, "shape must be one of full, channel, got 'row'"),
        (lpa, {"norm": "l1"}, "norm must be one of l2, linf, got 'l1'"),
        (lpa, {"mode": "free", "steps": 3}, "steps must be 1 with mode='free', got 3"),
        (lpa, {"mode": "free", "steps": 0}, "steps must be 1 with mode='free', got 0"),
        (lpl, {"radius": -1.0}, "radius must be finite and >= 0, got -1.0"),
        (lpl, {"geometry": "cone"}, "geometry must be one of signed, free, flipped, got 'cone'"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(make, arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared below)
        make(**arguments)
    assert str(error.value) == message
