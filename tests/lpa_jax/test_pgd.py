"""Class-level PGD: parity with a slow float64 loop, and the contracts of the method."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpa_jax import pgd, tables
from tests.helpers import reference

BATCH, CLASSES = 5, 4
FEATURE_SHAPES = ((), (3,), (2, 2, 3))
LABELS = np.array([0, 1, 1, 3, 0], np.int32)
MEMBERS = {0: [0, 4], 1: [1, 2], 3: [3]}  # class 2 is absent
SIGN = np.array([1.0, -1.0, 1.0, -1.0])
RADIUS = np.array([0.5, 0.8, 1.1, 0.3])
DTYPES = (jnp.float32, jnp.bfloat16)


class Problem:
    """A random network above the injection point, with activations and soft targets."""

    def __init__(self, seed=0, feature_shape=(3,), dtype=jnp.float32, gain=1.0):
        rng = np.random.default_rng(seed)
        self.network = reference.random_network(rng, feature_shape, CLASSES, gain=gain)
        self.targets = rng.dirichlet(np.ones(CLASSES), size=BATCH)
        self.activations = rng.normal(size=(BATCH, *feature_shape))
        self.dtype = dtype

    @property
    def h(self):
        return jnp.asarray(self.activations, self.dtype)

    def loss(self, h):
        z = reference.jax_logits(self.network, h)
        return reference.jax_cross_entropy(z, jnp.asarray(self.targets, h.dtype))

    def numpy_gradient(self, i, h):
        return reference.loss_gradient(self.network, h, self.targets[i])

    def class_losses(self, delta):
        """J_c in float64."""
        losses = [
            reference.loss(self.network, h + delta[y], t)
            for h, y, t in zip(self.activations, LABELS, self.targets, strict=True)
        ]
        return np.array([np.mean(np.array(losses)[members]) for members in MEMBERS.values()])

    def class_means(self, shape):
        means = np.zeros((CLASSES, *self.activations.shape[1:]))
        for c, members in MEMBERS.items():
            means[c] = self.activations[members].mean(axis=0)
        positions = tuple(range(1, means.ndim - 1)) if shape == "channel" else ()
        return means.mean(axis=positions, keepdims=True)

    def solve(self, loss=None, **options):
        arguments = {"sign": jnp.asarray(SIGN), "radius": jnp.asarray(RADIUS), **options}
        labels = jnp.asarray(arguments.pop("labels", LABELS))
        return pgd.class_perturbation(loss or self.loss, self.h, labels, **arguments)


def lengths(delta, norm):
    return np.array([reference.size(row, norm) for row in np.asarray(delta, np.float64)])


def alignment(delta, class_means):
    return np.array([np.sum(d * m) for d, m in zip(np.asarray(delta), class_means, strict=True)])


problems = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "feature_shape": st.sampled_from(FEATURE_SHAPES),
        "labels": st.lists(st.integers(0, CLASSES - 1), min_size=BATCH, max_size=BATCH),
        "zero": st.sampled_from(["nothing"] * 4 + ["activations", "gradients"]),
        "carried": st.booleans(),
    }
)
some_options = st.fixed_dictionaries(
    {
        "sign": st.lists(st.sampled_from([-1, 0, 1]), min_size=CLASSES, max_size=CLASSES),
        "radius": st.lists(st.just(0.0) | st.floats(1e-3, 2.0), min_size=CLASSES, max_size=CLASSES),
        "steps": st.integers(0, 4),
        "step_size": st.floats(0.05, 3.0),
        "geometry": st.sampled_from(pgd.GEOMETRIES),
        "norm": st.sampled_from(pgd.NORMS),
        "shape": st.sampled_from(pgd.SHAPES),
        "min_cosine": st.sampled_from([0.0, 0.0, 0.1, 0.6, 1.0]),
    }
).filter(lambda options: options["geometry"] != "free" or options["min_cosine"] == 0)


drawn = settings(max_examples=14, deadline=None, derandomize=True, database=None)


@drawn
@given(problems, some_options)
def test_parity_with_the_slow_loop_in_float64(problem, options):
    assert_parity(problem, options)


@pytest.mark.slow
@settings(drawn, max_examples=200)
@given(problems, some_options)
def test_parity_with_the_slow_loop_in_float64_on_many_problems(problem, options):
    assert_parity(problem, options)


def assert_parity(problem, options):
    with jax.enable_x64(True):
        labels = np.array(problem["labels"])
        gain = 0.0 if problem["zero"] == "gradients" else 1.0
        p = Problem(problem["seed"], problem["feature_shape"], jnp.float64, gain)
        if problem["zero"] == "activations":
            p.activations = np.zeros_like(p.activations)
        options = {**options, "sign": np.array(options["sign"], np.float64)}
        options["radius"] = np.array(options["radius"])
        if problem["carried"]:
            rng = np.random.default_rng(problem["seed"] + 1)
            channel = options["shape"] == "channel" and len(problem["feature_shape"]) > 1
            row = (1, 1, 3) if channel else problem["feature_shape"]
            options["initial"] = rng.normal(size=(CLASSES, *row))
        expected = reference.class_perturbation(p.numpy_gradient, p.activations, labels, **options)
        actual = p.solve(labels=labels, **options)
        assert actual.dtype == jnp.float64
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", pgd.NORMS)
def test_contract_01_perturbation_stays_in_its_ball(dtype, norm):
    tolerance = 1e-3 if dtype == jnp.bfloat16 else 1e-6
    p = Problem(1, (2, 2, 3), dtype)
    for geometry, shape, steps in itertools.product(pgd.GEOMETRIES, pgd.SHAPES, (0, 3)):
        row = (2, 2, 3) if shape == "full" else (1, 1, 3)
        delta = p.solve(
            norm=norm,
            geometry=geometry,
            shape=shape,
            steps=steps,
            step_size=5.0,
            initial=3.0 * jnp.ones((CLASSES, *row)),
        )
        assert delta.dtype == jnp.float32
        assert delta.shape == (CLASSES, *row)
        assert np.all(lengths(delta, norm) <= RADIUS * (1 + tolerance))
        # The path is longer than the radius, so that the ball is what stops it.
        if geometry == "free" and steps:
            reached = lengths(delta, norm) / RADIUS
            np.testing.assert_allclose(reached[list(MEMBERS)], 1.0, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_03_members_share_one_delta(dtype):
    p = Problem(2, dtype=dtype)
    delta = p.solve()
    moved = pgd.add_to_members(p.h, delta, jnp.asarray(LABELS))
    assert moved.dtype == dtype
    expected = np.asarray(p.h, np.float32) + np.asarray(delta)[LABELS]
    np.testing.assert_array_equal(moved, jnp.asarray(expected, dtype))
    # The order of the batch and the examples of other classes do not matter.
    order = np.array([4, 2, 3, 1, 0])
    shuffled = Problem(2, dtype=dtype)
    shuffled.activations, shuffled.targets = p.activations[order], p.targets[order]
    np.testing.assert_allclose(shuffled.solve(labels=LABELS[order]), delta, atol=1e-6)
    others = Problem(2, dtype=dtype)
    others.activations = np.where((LABELS == 1)[:, None], p.activations, 7.0)
    np.testing.assert_allclose(others.solve()[1], delta[1], atol=1e-6)


@pytest.mark.parametrize("geometry", pgd.GEOMETRIES)
def test_contract_03_absent_class_gets_zero_and_changes_nothing(geometry):
    p = Problem(3)
    carried = jnp.ones((CLASSES, 3))
    delta = p.solve(geometry=geometry, initial=carried)
    np.testing.assert_array_equal(delta[2], np.zeros(3))
    assert np.all(lengths(delta, "l2")[list(MEMBERS)] > 0)
    changed = p.solve(
        geometry=geometry,
        initial=carried.at[2].set(-50.0),
        sign=jnp.asarray(SIGN).at[2].set(-1.0),
        radius=jnp.asarray(RADIUS).at[2].set(100.0),
    )
    np.testing.assert_array_equal(changed, delta)


@pytest.mark.parametrize("norm", pgd.NORMS)
@pytest.mark.parametrize("shape", pgd.SHAPES)
def test_contract_04_small_free_step_never_moves_the_loss_the_wrong_way(norm, shape):
    with jax.enable_x64(True):
        for seed in range(5):
            p = Problem(seed, (2, 2, 3), jnp.float64)
            delta = p.solve(geometry="free", norm=norm, shape=shape, steps=1, radius=1e-4 * RADIUS)
            change = p.class_losses(np.asarray(delta)) - p.class_losses(np.zeros_like(delta))
            assert np.all(change * SIGN[list(MEMBERS)] > 0)


@pytest.mark.parametrize("norm", pgd.NORMS)
@pytest.mark.parametrize("shape", pgd.SHAPES)
def test_contract_04_signed_geometry_is_expansive_or_contractive(norm, shape):
    unconstrained = []
    for seed in range(5):
        p = Problem(seed, (2, 2, 3))
        means = p.class_means(shape)
        for orientation, geometry in ((1, "signed"), (-1, "flipped")):
            delta = np.asarray(p.solve(norm=norm, shape=shape, geometry=geometry))
            assert np.all(orientation * SIGN * alignment(delta, means) >= -1e-6)
            if geometry == "signed":
                longer = lengths(means + delta, "l2") - lengths(means, "l2")
                assert np.all(longer[SIGN > 0] >= -1e-6)
        free = np.asarray(p.solve(norm=norm, shape=shape, geometry="free"))
        unconstrained.append(SIGN * alignment(free, means))
    assert np.min(unconstrained) < -1e-2  # else the half-space was never needed


@pytest.mark.parametrize("norm", pgd.NORMS)
@pytest.mark.parametrize("shape", pgd.SHAPES)
def test_contract_04_a_smallest_cosine_makes_contraction_true(norm, shape):
    cosine, without = 0.3, []
    for seed in range(5):
        p = Problem(seed, (2, 2, 3))
        means = p.class_means(shape)
        # By the law of cosines an l2 length of 2 cosine ||hbar|| is where shortening ends.
        sizes = np.array([2 * cosine, 2 * cosine / np.sqrt(means[0].size)])[pgd.NORMS.index(norm)]
        options = {"norm": norm, "shape": shape, "radius": sizes * lengths(means, "l2")}
        for kappa in (0.0, cosine):
            delta = np.asarray(p.solve(min_cosine=kappa, **options), np.float64)
            longer = lengths(means + delta, "l2") - lengths(means, "l2")
            least = kappa * lengths(delta, "l2") * lengths(means, "l2")
            assert np.all(SIGN * alignment(delta, means) >= least - 1e-5)
            if kappa:
                assert np.all(SIGN * longer >= -1e-5)
            else:
                without.append(longer[SIGN < 0])
    assert np.max(without) > 1e-2  # else the half-space would do


def test_contract_05_no_gradient_flows_through_the_perturbation():
    p = Problem(5)
    carried = jnp.full((CLASSES, 3), 0.1)
    weights = jax.tree.map(jnp.float32, p.network)
    targets = jnp.asarray(p.targets, jnp.float32)

    def loss(weights, h):
        return reference.jax_cross_entropy(reference.jax_logits(weights, h), targets)

    def delta_of(weights, h, sign, radius, initial):
        return pgd.class_perturbation(
            functools.partial(loss, weights),
            h,
            jnp.asarray(LABELS),
            sign=sign,
            radius=radius,
            initial=initial,
        )

    arguments = (weights, p.h, jnp.float32(SIGN), jnp.float32(RADIUS), carried)

    def training_loss(weights, h, delta):
        if delta is None:
            delta = delta_of(weights, h, *arguments[2:])
        return jnp.sum(loss(weights, pgd.add_to_members(h, delta, jnp.asarray(LABELS))))

    @jax.jit
    def gradients(*arguments):
        through_delta = jax.grad(lambda *a: jnp.sum(delta_of(*a)), argnums=range(5))(*arguments)
        train = jax.grad(training_loss, argnums=(0, 1))
        delta = delta_of(*arguments)
        return through_delta, train(*arguments[:2], None), train(*arguments[:2], delta)

    through_delta, trained, frozen = gradients(*arguments)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(through_delta))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), trained, frozen)
    assert np.any(trained[1])


DEGENERATE = {
    "zero gradient": {"loss": lambda h: jnp.zeros(h.shape[0], h.dtype)},
    "zero activation": {"activations": np.zeros((BATCH, 3))},
    "one class": {"labels": np.full(BATCH, 2)},
    "one example": {"activations": np.ones((1, 3)), "labels": np.array([1])},
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, jnp.float32) for name in DEGENERATE),
        ("zero gradient", jnp.bfloat16),
        ("zero activation", jnp.bfloat16),
    ],
)
def test_contract_06_degenerate_problems_give_finite_results(name, dtype):
    case = DEGENERATE[name]
    p = Problem(6, dtype=dtype)
    p.activations = case.get("activations", p.activations)
    labels = case.get("labels", LABELS)
    p.targets = p.targets[: len(labels)]
    for geometry, norm in itertools.product(pgd.GEOMETRIES, pgd.NORMS):
        delta = p.solve(loss=case.get("loss"), labels=labels, geometry=geometry, norm=norm)
        assert np.all(np.isfinite(delta))
        assert np.all(lengths(delta, norm) <= RADIUS * (1 + 1e-3))
        moved = np.zeros(CLASSES, bool)
        moved[np.unique(labels)] = name != "zero gradient"
        if geometry == "free":
            np.testing.assert_array_equal(lengths(delta, norm) > 0, moved)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_contract_06_the_scale_of_the_gradient_does_not_matter(factor):
    # The square of 1e-30 is zero and that of 1e30 infinite in float32.
    p = Problem(6)
    scaled = p.solve(loss=lambda h: factor * p.loss(h))
    np.testing.assert_allclose(scaled, p.solve(), atol=1e-5)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(("label", "position"), [(CLASSES, 4), (-2, 0), (1000, 2)])
def test_contract_10_labels_outside_the_classes_are_refused(convert, label, position):
    labels = LABELS.copy()
    labels[position] = label
    message = rf"^labels must be in 0\.\.3 or -1, got {label} at position {position}$"
    with pytest.raises(ValueError, match=message):
        Problem().solve(labels=convert(labels))
    with pytest.raises(ValueError, match=message):
        pgd.check_labels(convert(labels), CLASSES, may_ignore=True)
    labels[position] = -1
    with pytest.raises(ValueError, match=r"^labels must be in 0\.\.3, got -1"):
        pgd.check_labels(convert(labels), CLASSES)


def test_traced_labels_pass_the_check_that_they_cannot_be_given():
    p = Problem(7)
    jitted = jax.jit(lambda labels: p.solve(labels=labels))(jnp.asarray(LABELS))
    np.testing.assert_allclose(jitted, p.solve(), atol=1e-6)


H = np.ones((BATCH, 3), np.float32)
BAD_ARGUMENTS = [
    ({"steps": -1}, "steps must be a whole number >= 0, got -1"),
    ({"steps": 1.5}, "steps must be a whole number >= 0, got 1.5"),
    ({"step_size": 0.0}, "step_size must be finite and > 0, got 0.0"),
    ({"step_size": np.inf}, "step_size must be finite and > 0, got inf"),
    ({"geometry": "round"}, "geometry must be one of signed, free, flipped, got 'round'"),
    ({"norm": "l1"}, "norm must be one of l2, linf, got 'l1'"),
    ({"min_cosine": 1.5}, "min_cosine must be in [0, 1], got 1.5"),
    ({"min_cosine": np.nan}, "min_cosine must be in [0, 1], got nan"),
    ({"min_cosine": 0.3, "geometry": "free"},
     "min_cosine must be 0 with geometry='free', which has no cone, got 0.3"),
    ({"shape": "pixel"}, "shape must be one of full, channel, got 'pixel'"),
    ({"activations": H.astype(np.int32)},
     "activations must be a floating array [B, ...], got int32 (5, 3)"),
    ({"activations": np.float32(1.0)},
     "activations must be a floating array [B, ...], got float32 ()"),
    ({"labels": LABELS[:4]}, "labels must have shape (5,) like the activations, got (4,)"),
    ({"labels": LABELS.astype(np.float32)}, "labels must be integers, got dtype float32"),
    ({"sign": SIGN[:3]}, "sign and radius must both have shape [C], got (3,) and (4,)"),
    ({"sign": 2 * SIGN}, f"sign must be -1, 0 or 1 for every class, got {(2 * SIGN).tolist()}"),
    ({"radius": np.array([1.0, 2.0, -0.5, 1.0])},
     "radius must be finite and >= 0 for every class, got [1.0, 2.0, -0.5, 1.0]"),
    ({"sign": np.float32(1.0), "radius": np.float32(1.0)},
     "sign and radius must both have shape [C], got () and ()"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_named_with_its_value(bad, message):
    good = {"activations": H, "labels": LABELS, "sign": SIGN, "radius": RADIUS}
    arguments = {**good, **bad}
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared below)
        pgd.class_perturbation(
            lambda h: jnp.sum(h, axis=-1),
            arguments.pop("activations"),
            arguments.pop("labels"),
            **arguments,
        )
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("shape", "initial_shape"),
    [("full", (1, 2, 2, 3)), ("full", (CLASSES, 12)), ("channel", (CLASSES, 2, 2, 3))],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_an_initial_perturbation_of_another_shape_is_refused(shape, initial_shape, steps):
    with pytest.raises(ValueError, match=r"^initial must "):
        Problem(0, (2, 2, 3)).solve(shape=shape, initial=jnp.ones(initial_shape), steps=steps)


def test_numpy_arrays_of_any_float_are_accepted():
    p = Problem(8)
    delta = pgd.class_perturbation(p.loss, p.activations, LABELS, sign=SIGN, radius=RADIUS)
    assert delta.dtype == jnp.float32
    np.testing.assert_array_equal(delta, p.solve())


@pytest.mark.parametrize("feature_shape", FEATURE_SHAPES)
@pytest.mark.parametrize("shape", pgd.SHAPES)
def test_bfloat16_agrees_with_float32_to_its_precision(feature_shape, shape):
    # One step; more would add up differences in direction where the gradient nearly vanishes.
    full = Problem(9, feature_shape).solve(shape=shape, steps=1)
    half = Problem(9, feature_shape, jnp.bfloat16).solve(shape=shape, steps=1)
    assert half.dtype == jnp.float32
    assert half.shape == full.shape
    np.testing.assert_allclose(half, full, atol=0.1 * RADIUS.max())


@pytest.mark.parametrize("min_cosine", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("norm", pgd.NORMS)
def test_projection_lands_in_the_set_and_for_l2_on_its_nearest_point(norm, min_cosine):
    rng = np.random.default_rng(0)
    delta, mean, inside = (rng.normal(size=(200, 3)) for _ in range(3))
    radius = rng.uniform(0.2, 3.0, size=200)
    cone = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    with jax.enable_x64(True):
        nearest = np.asarray(
            pgd.project(*map(jnp.asarray, (delta, radius, cone)), norm, min_cosine)
        )
    assert np.all(lengths(nearest, norm) <= radius * (1 + 1e-12))
    assert np.all(alignment(nearest, cone) >= min_cosine * lengths(nearest, "l2") - 1e-12)
    already = alignment(delta, cone) >= min_cosine * lengths(delta, "l2")
    already &= lengths(delta, norm) <= radius
    assert already.any() == (min_cosine < 1)
    assert not already.all()
    np.testing.assert_array_equal(nearest[already], delta[already])
    if norm == "l2":
        # P is the nearest point of a convex set iff <x - P, k - P> <= 0 for every k in the set.
        inside -= alignment(inside, cone)[:, None] * cone
        sine = np.sqrt(1 - min_cosine**2) / lengths(inside, "l2")
        inside = min_cosine * cone + sine[:, None] * inside  # on the cone's edge
        inside *= (radius * rng.uniform(size=200))[:, None]
        assert np.all(alignment(delta - nearest, inside - nearest) <= 1e-12)


def test_class_gradient_is_the_mean_over_the_members():
    p = Problem(10)
    delta = np.random.default_rng(1).normal(size=(CLASSES, 3))
    with jax.enable_x64(True):
        classes = tables.BatchClasses.of(jnp.asarray(LABELS), CLASSES, dtype=jnp.float64)
        gradient, aux = pgd.class_gradient(
            lambda h: (p.loss(h), "aux"), jnp.asarray(p.activations), classes, jnp.asarray(delta)
        )
    expected = np.zeros((CLASSES, 3))
    for c, members in MEMBERS.items():
        rows = [p.numpy_gradient(i, p.activations[i] + delta[c]) for i in members]
        expected[c] = np.mean(rows, axis=0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9)
    np.testing.assert_array_equal(classes.counts, [2, 2, 0, 1])
    assert aux == "aux"


def test_a_class_spread_over_a_mapped_axis_is_one_class():
    p = Problem(11)
    h, targets = p.activations[:4], p.targets[:4]  # classes 0 1 1 3: class 1 on both shards
    labels = jnp.asarray(LABELS[:4])

    def solve(h, targets, labels, axis_name=None):
        def loss(h):
            return reference.jax_cross_entropy(reference.jax_logits(p.network, h), targets)

        return pgd.class_perturbation(
            loss,
            h,
            labels,
            sign=jnp.float32(SIGN),
            radius=jnp.float32(RADIUS),
            axis_name=axis_name,
        )

    arguments = (jnp.float32(h), jnp.float32(targets), labels)
    shards = [jnp.reshape(a, (2, 2, *a.shape[1:])) for a in arguments]
    mapped = jax.jit(jax.vmap(functools.partial(solve, axis_name="i"), axis_name="i"))(*shards)
    np.testing.assert_allclose(mapped[0], jax.jit(solve)(*arguments), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mapped[0], mapped[1])


def test_no_steps_return_the_projected_initial_perturbation():
    p = Problem(12)
    np.testing.assert_array_equal(p.solve(steps=0), np.zeros((CLASSES, 3)))
    initial = np.random.default_rng(0).normal(size=(CLASSES, 3))
    expected = reference.class_perturbation(
        None, p.activations, LABELS, sign=SIGN, radius=RADIUS, steps=0, initial=initial
    )
    np.testing.assert_allclose(p.solve(steps=0, initial=jnp.asarray(initial)), expected, atol=1e-6)


def test_by_hand_in_one_dimension():
    # Loss h^2/2 with h = 2 (s = +1) and h = 1 (s = -1): two steps of 0.75 eps, cut at eps.
    solve = functools.partial(pgd.class_perturbation, lambda h: 0.5 * h**2, steps=2)
    h, sign, radius = jnp.array([2.0, 1.0]), jnp.array([1, -1]), jnp.array([0.5, 0.25])
    delta = jax.jit(solve)(h, jnp.array([0, 1]), sign=sign, radius=radius)
    np.testing.assert_array_equal(delta, [0.5, -0.25])
