"""LPA and LPL as perturbations: contracts, radii, the state they carry and their arguments."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpa_jax import assignment, pgd
from lpa_jax.perturbations import Feedback, lpa, lpl
from tests.helpers import reference
from tests.helpers.lpa_batches import (
    CLASSES,
    CUSTOM,
    FEATURES,
    LABELS,
    MODES,
    MULTIPLIER,
    SIGN,
    Batch,
    LogitBatch,
    confidence_signs,
    expected_scale,
)

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
def test_with_a_probability_an_example_gets_the_whole_delta_or_none(mode):
    batch = Batch(labels=np.arange(400) % CLASSES)
    everywhere, some = (lpa(0.5, mode=mode, assignment=CUSTOM, probability=p) for p in (1.0, 0.3))
    state = batch.init(everywhere, jnp.float32)
    if mode == "free":
        state = {**state, "delta": jnp.ones((CLASSES, *FEATURES))}

    @jax.jit
    def perturbed(rng):
        site = dataclasses.replace(batch.site(jnp.float32), rng=rng)
        applied = [p.apply(state, site) for p in (everywhere, some)]
        return applied, site.activation

    chosen = []
    for number in (0, 1, 0):
        (whole, part), own = jax.device_get(perturbed(jax.random.key(number)))
        changed = (part.activation != own).any(axis=(1, 2))
        expected = np.where(changed[:, None, None], whole.activation, own)
        np.testing.assert_array_equal(part.activation, expected)
        jax.tree.map(np.testing.assert_array_equal, whole.state, part.state)
        chosen.append(changed)
    assert 0.2 < np.mean(chosen) < 0.4
    np.testing.assert_array_equal(chosen[0], chosen[2])
    assert (chosen[0] != chosen[1]).any()


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


def test_options_may_be_jax_numbers_also_within_a_compiled_step():
    options = {"radius": 0.5, "steps": 2, "min_cosine": 0.1, "probability": 1.0}
    batch = Batch()

    def perturbed(given):
        def step():
            perturbation = lpa(**given, assignment=CUSTOM)
            state = batch.init(perturbation, jnp.float32)
            return perturbation.apply(state, batch.site(jnp.float32)).activation

        return jax.jit(step)()

    plain = perturbed(options)
    for convert in (jnp.asarray, np.asarray):
        given = {name: convert(value) for name, value in options.items()}
        np.testing.assert_array_equal(perturbed(given), plain)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lpa, {"radius": -0.1}, "radius must be finite and >= 0, got -0.1"),
        (lpa, {"radius": np.inf}, "radius must be finite and >= 0, got inf"),
        (lpa, {"negative_scale": -1.0}, "negative_scale must be finite and >= 0, got -1.0"),
        (lpa, {"probability": 0.0}, "probability must be in (0, 1], got 0.0"),
        (lpa, {"examples": 1.5}, "examples must be in (0, 1], got 1.5"),
        (lpa, {"mode": "carry", "examples": 0.5}, "examples must be 1 with mode='carry', got 0.5"),
        (lpa, {"assignment": 7}, "assignment must be an Assignment such as all_positive(), got 7"),
        (lpa, {"assignment": 0}, "assignment must be an Assignment such as all_positive(), got 0"),
        (lpl, {"assignment": 7}, "assignment must be an Assignment such as all_positive(), got 7"),
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
