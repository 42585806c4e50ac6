"""The modes of LPA: what cold, carry and free compute, remember and learn, visit by visit."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import assignment, pgd
from lpa_jax.perturbations import Feedback, lpa
from tests.helpers import reference
from tests.helpers.lpa_batches import (
    CLASSES,
    CUSTOM,
    FEATURES,
    LABELS,
    MODES,
    SIGN,
    Batch,
    confidence_signs,
    expected_scale,
)

# Every norm and every shape with every geometry; the other pairs of norm and shape are slow.
OPTIONS = [
    pytest.param(
        {"geometry": geometry, "norm": norm, "shape": shape}
        # Of the two that have a cone one is tested with a narrow one.
        | ({"min_cosine": 0.3} if geometry == "flipped" else {}),
        id=f"{geometry}-{norm}-{shape}",
        marks=() if (norm == "l2") == (shape == "full") else pytest.mark.slow,
    )
    for geometry, norm, shape in itertools.product(pgd.GEOMETRIES, pgd.NORMS, pgd.SHAPES)
]


@pytest.mark.parametrize("options", OPTIONS)
def test_cold_is_class_perturbation_with_the_same_sign_and_radius(options, x64):
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


@pytest.mark.parametrize("options", OPTIONS)
def test_carry_is_class_perturbation_from_the_last_appearance(options, x64):
    options = options | {"step_size": 0.8}
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


@pytest.mark.parametrize("options", OPTIONS)
def test_free_is_one_ascent_step_with_the_gradient_of_the_training_pass(options, x64):
    options = options | {"step_size": 0.8}
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


@pytest.mark.parametrize(("geometry", "shape"), [("signed", "channel"), ("free", "full")])
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


@pytest.mark.parametrize(("devices", "part"), [(1, [0, 1, 2, 4, 6]), (2, [0, 2, 4, 5, 6, 7])])
def test_a_part_of_the_examples_gives_gradients_and_confidence_for_all(devices, part, x64):
    batch = Batch(4, np.array([1, 1, 0, 1, 3, 1, 0, 1, 0, 1], np.int32))
    perturbation = lpa(0.5, assignment=assignment.by_confidence(kappa=1.0), examples=0.5)
    site = batch.site()

    def apply(h, targets, labels):
        arrays = {"activation": h, "targets": targets, "labels": labels, "axis_name": "i"}
        here = dataclasses.replace(site, **arrays, decode=lambda h, chosen: site.decode(h))
        applied = perturbation.apply({}, here)
        return applied.activation, dict(applied.aux)

    arrays = (site.activation, site.targets, site.labels)
    shards = [a.reshape(devices, -1, *a.shape[1:]) for a in arrays]
    activation, aux = jax.jit(jax.vmap(apply, axis_name="i"))(*shards)

    confidence = reference.class_confidence(batch.logits[part], batch.labels[part])
    sign = confidence_signs(confidence, batch.present())
    deviation = np.abs(confidence - confidence[batch.present()].mean())
    radius = 0.5 * (1 + deviation) * expected_scale(batch, "relative", "l2", "full")
    delta = reference.class_perturbation(
        # The direction of a mean gradient does not depend on the number of examples.
        lambda i, h: (i in part) * batch.numpy_gradient(i, h),
        batch.activations,
        batch.labels,
        sign=sign,
        radius=radius,
    )
    seen = np.reshape(activation, batch.activations.shape) - batch.activations
    np.testing.assert_allclose(seen, delta[batch.labels], rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(aux["sign"][-1], sign)
    np.testing.assert_allclose(aux["radius"][-1], np.where(sign != 0, radius, 0), rtol=1e-9)
