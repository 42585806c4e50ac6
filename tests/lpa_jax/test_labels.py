"""Labels of positions and of several classes, against slow NumPy references and their contracts."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lpa_jax
from lpa_jax import labels, losses, metrics, penalties, perturbations
from tests.helpers import reference

BATCH, TIME, WIDTH, CLASSES = 3, 4, 5, 4
TOKENS = np.array([[0, 1, 1, -1], [3, 0, -1, -1], [1, 3, 3, 0]])  # class 2 is absent
SEVERAL = np.array(
    [[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0, -1], [0, 0, 0, 0], [-1] * 4, [1, 0, 0, 0]]
)
SIGN = np.array([1.0, -1.0, 1.0, -1.0])
RADIUS = np.array([0.5, 0.8, 1.1, 0.3])
SIGMOID = losses.sigmoid_cross_entropy()
KINDS = ("tokens", "several")


class Problem:
    """Activations, labels and a network above, for one kind of labels."""

    def __init__(self, kind, seed=0):
        rng = np.random.default_rng(seed)
        self.kind, self.several = kind, kind == "several"
        self.network = reference.PositionNetwork(
            rng.normal(size=(WIDTH, 6)), rng.normal(size=(WIDTH, 6)), rng.normal(size=(6, CLASSES))
        )
        self.labels = SEVERAL if self.several else TOKENS
        lead = (len(SEVERAL),) if self.several else TOKENS.shape
        self.h = rng.normal(size=(*lead, WIDTH))

    @property
    def members(self):
        """The classes of each row."""
        if self.several:
            return [list(np.flatnonzero(row == 1)) for row in self.labels]
        return [[] if label < 0 else [label] for label in self.labels.reshape(-1)]

    def loss(self, h):
        """Losses of the library's shape, those of what does not count among them."""
        if self.several:
            logits = self.network.logits(h[:, None])[:, 0]
            return SIGMOID(logits, jnp.asarray(self.labels))
        logits = self.network.logits(h)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), self.labels[..., None], -1)[..., 0]

    def gradients(self, rows):
        """Of the sum of the losses that count, by hand, example by example."""
        found = []
        for h, label in zip(rows.reshape(self.h.shape), self.labels, strict=True):
            if self.several:
                h = h[None]
                by_logits = 1 / (1 + np.exp(-self.network.logits(h))) - label
                by_logits = np.where(label < 0, 0.0, by_logits)
            else:
                by_logits = np.array([reference.softmax(z) for z in self.network.logits(h)])
                by_logits = by_logits - np.eye(CLASSES)[label]
                by_logits = np.where(label[:, None] < 0, 0.0, by_logits)
            found.append(self.network.gradient(h, by_logits))
        return np.concatenate(found)

    def expected(self, **options):
        rows = self.h.reshape(-1, WIDTH)
        options = {"sign": SIGN, "radius": RADIUS, **options}
        return reference.joint_perturbation(self.gradients, rows, self.members, **options)

    def found(self, dtype=None, **options):
        h = jnp.asarray(self.h, dtype)
        options = {"sign": SIGN, "radius": RADIUS, "several": self.several, **options}
        learn = functools.partial(lpa_jax.class_perturbation, self.loss, **options)
        return jax.jit(learn)(h, self.labels)


@pytest.mark.parametrize("kind", KINDS)
def test_class_perturbation_is_that_of_the_slow_reference(kind, x64):
    problem = Problem(kind)
    start = np.random.default_rng(1).normal(size=(CLASSES, WIDTH))
    for options in (
        {},
        {"geometry": "free", "norm": "linf"},
        {"geometry": "flipped", "initial": start, "steps": 1},
        {"norm": "linf", "steps": 2, "initial": start},
    ):
        expected, _ = problem.expected(**options)
        found = problem.found(**options)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12, err_msg=str(options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_perturbation_exceeds_its_radius_and_absent_classes_get_zero(kind, dtype):
    problem = Problem(kind)
    for geometry, norm in (("signed", "l2"), ("free", "linf")):
        delta = problem.found(dtype, geometry=geometry, norm=norm, step_size=9.0)
        sizes = np.array([reference.size(row, norm) for row in np.float64(delta)])
        assert np.all(sizes <= RADIUS * (1 + 1e-6))
        np.testing.assert_array_equal(delta[2], 0.0)
        assert np.all(sizes[[0, 1, 3]] > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_half_space_is_that_of_the_class_mean_over_its_members(kind):
    problem = Problem(kind)
    rows, members = problem.h.reshape(-1, WIDTH), problem.members
    bent = 0
    for geometry, orientation in (("signed", 1.0), ("flipped", -1.0)):
        delta = np.asarray(problem.found(geometry=geometry))
        free = np.asarray(problem.found(geometry="free"))
        for c in (0, 1, 3):
            mean = np.mean([h for h, classes in zip(rows, members, strict=True) if c in classes], 0)
            assert orientation * SIGN[c] * delta[c] @ mean >= -1e-5
            bent += orientation * SIGN[c] * free[c] @ mean < -1e-3
    assert bent > 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_count_has_no_part(kind):
    problem = Problem(kind)
    before = problem.found()
    ignored = np.all(problem.labels < 0, axis=1) if problem.several else problem.labels < 0
    if problem.several:  # rows do not interact: whatever their values
        problem.h[ignored] = np.nan
    # The loss of a position that does not count would reach those before it.
    loss = problem.loss
    reached = (lambda h: h) if problem.several else functools.partial(jnp.cumsum, axis=1)
    problem.loss = lambda h: loss(h) + jnp.where(ignored, 9.0 * jnp.sum(reached(h), axis=-1), 0.0)
    np.testing.assert_allclose(problem.found(), before, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_flows_through_the_perturbation(kind):
    problem = Problem(kind)

    def total(h, sign, radius):
        return jnp.sum(
            lpa_jax.class_perturbation(
                problem.loss,
                h,
                jnp.asarray(problem.labels),
                sign=sign,
                radius=radius,
                several=problem.several,
            )
        )

    h = jnp.asarray(problem.h, jnp.float32)
    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    for gradient in gradients(h, jnp.asarray(SIGN), jnp.asarray(RADIUS)):
        np.testing.assert_array_equal(gradient, 0.0)


def network_of(problem):
    """The network below (a matrix) and above, cut between."""

    def decode(params, h):
        above = reference.PositionNetwork(*params["above"])
        return above.logits(h[:, None])[:, 0] if problem.several else above.logits(h)

    return lpa_jax.CutFunctions(lambda params, x: x @ params["below"], decode)


def trained(problem, plan, steps=1, batch=None, axes=None, **options):
    """State and metrics after some steps of SGD on the problem; h = x at the start."""
    above = tuple(jnp.asarray(w, jnp.float32) for w in problem.network)
    params = {"below": jnp.eye(WIDTH), "above": above}
    batch = batch or {"image": np.float32(problem.h), "label": problem.labels}
    options = {"loss": SIGMOID if problem.several else lpa_jax.cross_entropy, **options}
    network = network_of(problem)
    network = dataclasses.replace(network, init_params=lambda rng, x: params)
    state = lpa_jax.TrainState.create(network, optax.sgd(0.1), jax.random.key(0), batch, plan)
    step = functools.partial(lpa_jax.lpa_step, perturbations=plan, **options)
    if axes:
        batch = jax.tree.map(lambda leaf: np.reshape(leaf, (axes, -1, *leaf.shape[1:])), batch)
        step = jax.vmap(functools.partial(step, axis_name="i"), (None, 0), axis_name="i")
    step, pairs = jax.jit(step), {}
    for _ in range(steps):
        state, pairs = step(state, batch)
        if axes:
            state, pairs = jax.tree.map(lambda leaf: leaf[-1], (state, pairs))
    return state, pairs


RULE = lpa_jax.custom(SIGN, RADIUS)


def test_the_loss_of_a_position_that_does_not_count_moves_no_other():
    smooth = losses.label_smoothing(0.3)  # not 0 without a target

    def of_counted(logits, targets):
        return smooth(logits, targets) * jnp.sum(targets, axis=-1)

    plan = {"hidden": lpa_jax.lpa(0.3, mode="carry", assignment=RULE)}
    found, expected = (
        trained(Problem("tokens"), plan, loss=loss)[0].perturbation_state["hidden"]["delta"]
        for loss in (smooth, of_counted)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_trained_on_the_perturbed_rows_that_count(kind):
    problem = Problem(kind)
    plan = {"hidden": lpa_jax.lpa(1.0, assignment=RULE, scale="absolute")}
    _, pairs = trained(problem, plan)
    _, added = problem.expected()
    h, total, count = problem.h + added.reshape(problem.h.shape), 0.0, 0
    for example, label in zip(h, problem.labels, strict=True):
        if problem.several:
            z = problem.network.logits(example[None])[0]
            total += np.sum(np.where(label < 0, 0.0, np.log1p(np.exp(z)) - label * z))
            count += np.any(label >= 0)
        else:
            for z, y in zip(problem.network.logits(example), label, strict=True):
                total -= np.log(reference.softmax(z)[y]) if y >= 0 else 0.0
                count += y >= 0
    np.testing.assert_allclose(pairs["loss"], (total, count), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_carry_and_free_take_the_step_of_the_reference_from_what_they_kept(kind):
    problem = Problem(kind)
    options = {"assignment": RULE, "scale": "absolute"}
    for mode in ("carry", "free"):
        state, _ = trained(problem, {"hidden": lpa_jax.lpa(1.0, mode=mode, **options)})
        expected, _ = problem.expected(steps=1)
        found = state.perturbation_state["hidden"]["delta"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


QUICK = (("tokens", "cold"), ("several", "free"), ("tokens", "carry"))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        pytest.param(kind, mode, marks=() if (kind, mode) in QUICK else pytest.mark.slow)
        for kind, mode in itertools.product(KINDS, ("cold", "carry", "free"))
    ],
)
def test_devices_give_what_one_gives_and_a_mask_is_a_label_of_minus_1(kind, mode):
    problem = Problem(kind)
    batch = {"image": np.float32(problem.h), "label": problem.labels}
    batch = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[::-1]]), batch)
    rule = lpa_jax.by_confidence(kappa=1.0, ema=0.5)
    plan = {"hidden": lpa_jax.lpa(0.3, 1, mode=mode, assignment=rule, radius_target=0.1)}
    plan["logits"] = lpa_jax.lpl(0.3, 1)
    one, one_pairs = trained(problem, plan, 2, batch)
    mask = batch["label"] >= 0
    mask = np.any(mask, axis=1) if problem.several else mask
    shown = np.where(mask[..., None] if problem.several else mask, batch["label"], 1)
    masked = {**batch, "label": shown, "mask": np.float32(mask)}
    for other in (trained(problem, plan, 2, masked), trained(problem, plan, 2, batch, axes=2)):
        assert_close((other[0].params, other[1]), (one.params, one_pairs))
        assert_close(other[0].perturbation_state, one.perturbation_state)
    assert np.isfinite(one_pairs["loss"][0])


def assert_close(found, expected):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected
    )


def test_one_class_given_as_several_is_trained_as_one_class():
    problem, rng = Problem("several"), np.random.default_rng(3)
    one = rng.integers(0, CLASSES, len(SEVERAL))
    plan = {"hidden": lpa_jax.lpa(0.5, assignment=lpa_jax.by_frequency([9, 8, 2, 1]))}
    plan["logits"] = lpa_jax.lpl(0.5, assignment=lpa_jax.all_positive())
    image = np.float32(problem.h)
    results = [
        trained(problem, plan, 2, {"image": image, "label": given})
        for given in (one, np.eye(CLASSES, dtype=int)[one])
    ]
    assert_close(results[1][0].params, results[0][0].params)
    assert_close(results[1][1]["loss"], results[0][1]["loss"])


def test_several_classes_may_be_booleans_or_floats_but_positions_are_integers():
    problem = Problem("several")
    known = np.maximum(SEVERAL, 0)
    image = np.float32(problem.h)
    expected = trained(problem, {}, 1, {"image": image, "label": known})[1]
    for given in (known == 1, np.float32(known)):
        assert_close(trained(problem, {}, 1, {"image": image, "label": given})[1], expected)
        lpa_jax.parallel.check_batch({"label": given}, CLASSES)
    refused("tokens", {}, "labels must be integers", labels=np.float32(TOKENS))


@pytest.mark.parametrize("shape", [(4,), (2,), (1,)])
def test_majority_is_that_of_a_slow_count(shape):
    rng = np.random.default_rng(0)
    fine = rng.integers(-1, 3, (5, 4))
    fine[0] = -1
    size = 4 // shape[0]
    expected = []
    for row in fine:
        blocks = [row[i * size : (i + 1) * size] for i in range(shape[0])]
        votes = [[np.sum(block == c) for c in range(3)] for block in blocks]
        expected.append([int(np.argmax(v)) if max(v) else -1 for v in votes])
    activation = jax.ShapeDtypeStruct((5, *shape, 7), jnp.float32)
    np.testing.assert_array_equal(labels.majority(jnp.asarray(fine), activation, 3), expected)
    grid = np.repeat(fine[:, :, None], 6, axis=2)
    wide = jax.ShapeDtypeStruct((5, *shape, 2, 7), jnp.float32)
    found = labels.majority(jnp.asarray(grid), wide, 3)
    np.testing.assert_array_equal(found, np.repeat(np.array(expected)[:, :, None], 2, axis=2))


@pytest.mark.parametrize("mode", ["cold", "carry", "free"])
def test_a_coarser_layer_is_perturbed_by_labels_of_its_own(mode):
    """The layer has two positions for the four of the labels; above it each is repeated."""
    rng, above = np.random.default_rng(0), Problem("tokens").network
    x = rng.normal(size=(BATCH, 2, WIDTH)).astype(np.float32)
    network = lpa_jax.CutFunctions(
        lambda params, x: x @ params,
        lambda params, h: above.logits(jnp.repeat(h, 2, axis=1)),
        init_params=lambda rng, x: jnp.eye(WIDTH),
    )
    batch = {"image": x, "label": TOKENS}
    options = {"mode": mode, "assignment": RULE, "scale": "absolute"}
    options["radius_target"] = 0.5 if mode == "cold" else None
    plan = {"hidden": perturbations.with_labels(lpa_jax.lpa(1.0, 1, **options))}
    state = lpa_jax.TrainState.create(network, optax.sgd(0.1), jax.random.key(0), batch, plan)
    state, pairs = jax.jit(functools.partial(lpa_jax.lpa_step, perturbations=plan))(state, batch)
    assert pairs["loss"][1] == np.sum(TOKENS >= 0)
    own = np.asarray(labels.majority(jnp.asarray(TOKENS), x, CLASSES)).reshape(-1)

    def gradients(rows):
        found = []
        for h, label in zip(rows.reshape(x.shape), TOKENS, strict=True):
            h = np.repeat(h, 2, axis=0)
            z = np.array([reference.softmax(z) for z in above.logits(h)])
            by_logits = np.where(label[:, None] < 0, 0.0, z - np.eye(CLASSES)[label])
            found.append(above.gradient(h, by_logits).reshape(2, 2, WIDTH).sum(axis=1))
        return np.concatenate(found)

    members = [[] if c < 0 else [c] for c in own]
    rows = np.float64(x.reshape(-1, WIDTH))
    expected, added = reference.joint_perturbation(
        gradients, rows, members, sign=SIGN, radius=RADIUS, steps=1
    )
    if mode != "cold":
        found = state.perturbation_state["hidden"]["delta"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    if mode != "free":  # in which delta is zero in the first pass
        z = above.logits(np.repeat((rows + added).reshape(x.shape), 2, axis=1))
        losses_of = [-np.log(reference.softmax(z[at])[y]) for at, y in np.ndenumerate(TOKENS)]
        np.testing.assert_allclose(
            pairs["loss"][0], np.sum(losses_of, where=TOKENS.reshape(-1) >= 0), rtol=1e-5
        )


def test_evaluation_of_several_classes_is_that_of_a_slow_count():
    problem = Problem("several")
    state, _ = trained(problem, {})
    batch = {"image": np.float32(problem.h), "label": SEVERAL}
    found = metrics.compute(lpa_jax.eval_step(state, batch, loss=SIGMOID))
    logits = state.network.run(
        lpa_jax.injection.Pass(state.variables, batch["image"]), {}, "logits"
    )[0]
    says, known, truth = np.asarray(logits) > 0, SEVERAL >= 0, SEVERAL == 1
    counted = known.any(axis=1)
    np.testing.assert_allclose(found["accuracy"], np.mean((says == truth)[known]))
    exact = [np.all((says == truth)[i][known[i]]) for i in np.flatnonzero(counted)]
    np.testing.assert_allclose(found["exact_match"], np.mean(exact))
    for c in range(CLASSES):
        hit = np.sum(says[:, c] & truth[:, c] & known[:, c])
        misses = np.sum((says[:, c] != truth[:, c]) & known[:, c])
        members = np.sum(truth[:, c])
        recall, f1 = found["per_class_accuracy"][c], found["per_class_f1"][c]
        np.testing.assert_allclose(recall, hit / members if members else np.nan)
        np.testing.assert_allclose(f1, 2 * hit / (2 * hit + misses) if hit + misses else np.nan)


def test_losses_of_domains_are_those_of_their_positions():
    problem = Problem("tokens")
    batch = {"image": np.float32(problem.h), "label": TOKENS, "domain": np.array([0, 1, 0])}
    added = {"vrex": penalties.vrex(num_domains=2, weight=1.0)}
    state, _ = trained(problem, {}, 0, batch)
    state = lpa_jax.TrainState.create(
        state.network, optax.sgd(0.1), jax.random.key(0), batch, penalties=added
    )
    _, pairs = jax.jit(functools.partial(lpa_jax.lpa_step, penalties=added))(state, batch)
    risks = [[], []]
    for h, row, domain in zip(problem.h, TOKENS, batch["domain"], strict=True):
        for z, y in zip(problem.network.logits(h), row, strict=True):
            risks[domain] += [-np.log(reference.softmax(z)[y])] if y >= 0 else []
    expected = np.var([np.mean(risk) for risk in risks])
    np.testing.assert_allclose(pairs["penalty/vrex"][0], expected, rtol=1e-4)


def refused(kind, plan, match, labels=None, **options):
    problem = Problem(kind)
    batch = {"image": np.float32(problem.h), "label": problem.labels if labels is None else labels}
    with pytest.raises(ValueError, match=match) as error:
        trained(problem, plan, batch=batch, **options)
    assert "\n" not in str(error.value)


def test_what_has_no_meaning_for_such_labels_is_refused_in_one_line():
    several, tokens = "several classes", "needs one label an example"
    refused("several", {}, several, loss=lpa_jax.cross_entropy)
    refused("several", {}, several, loss=losses.focal())
    refused("several", {"hidden": lpa_jax.rsc()}, tokens)
    for method in (lpa_jax.manifold_mixup(), lpa_jax.rsc()):
        refused("tokens", {"hidden": method}, tokens)
    for kind in ("several", "tokens"):
        part = {"hidden": lpa_jax.lpa(examples=0.5)}
        refused(kind, part, "examples must be 1 unless an example has one label, got")
    refused("tokens", {}, "must have shape", labels=TOKENS[:, :3])
    with pytest.raises(ValueError, match="labels must be 0, 1 or -1 for several classes"):
        lpa_jax.class_perturbation(
            jnp.sum, jnp.ones((6, 2)), SEVERAL * 2, sign=SIGN, radius=RADIUS, several=True
        )
    refused("tokens", {}, "one value for each label", loss=lambda z, t: jnp.zeros(len(z)))
    with pytest.raises(ValueError, match="must divide into the positions"):
        labels.majority(jnp.zeros((2, 6)), jax.ShapeDtypeStruct((2, 4, 3), jnp.float32), 2)
    narrow = {"below": lambda p, x: x[:, :2], "above": lambda p, h: jnp.repeat(h, 2, axis=1)}
    network = lpa_jax.CutFunctions(*narrow.values(), init_params=lambda rng, x: jnp.zeros(1))
    batch = {"image": np.ones((BATCH, TIME, CLASSES), np.float32), "label": TOKENS}
    plan = {"hidden": lpa_jax.lpa(0.1)}
    with pytest.raises(ValueError, match="must be the first axes of the activation at 'hidden'"):
        lpa_jax.TrainState.create(network, optax.sgd(0.1), jax.random.key(0), batch, plan)
    with pytest.raises(ValueError, match="must be by class, such as lpa"):
        perturbations.with_labels(lpa_jax.dropout())


def test_methods_without_classes_work_on_whole_examples():
    problem = Problem("tokens")
    for method in (lpa_jax.gaussian_noise(), lpa_jax.adversarial(0.1), lpa_jax.mixstyle()):
        _, pairs = trained(problem, {"hidden": method})
        assert np.isfinite(pairs["loss"][0]), method
    _, pairs = trained(Problem("several"), {"hidden": lpa_jax.manifold_mixup()})
    assert np.isfinite(pairs["loss"][0])


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_jit_cannot_refuse_make_the_loss_nan(kind):
    problem = Problem(kind)
    bad = np.where(np.arange(problem.labels.shape[1]) == 1, 7, problem.labels)
    odd = [{"label": bad}, {"mask": np.full(len(bad), 0.5)}]
    odd += [{"label": 0.7 * np.abs(problem.labels)}] if problem.several else []
    batch = {"image": np.float32(problem.h), "label": problem.labels}
    state, _ = trained(problem, {})
    loss = SIGMOID if problem.several else lpa_jax.cross_entropy
    step = jax.jit(functools.partial(lpa_jax.lpa_step, loss=loss))
    assert np.isfinite(step(state, batch)[1]["loss"][0])
    for entry in odd:
        assert np.isnan(step(state, {**batch, **entry})[1]["loss"][0])
    with pytest.raises(ValueError, match=r"batch\['mask'\] must be 0 or 1, got 0.5"):
        lpa_jax.lpa_step(state, {**batch, **odd[1]}, loss=loss)
