"""The grammar of methods and what a name stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lpa_jax
from experiments import long_tail
from experiments.images import compare
from experiments.images import flags as image_flags
from experiments.methods import flags, search
from experiments.methods import names as methods
from experiments.methods.build import assemble, traceable
from lpa_jax import losses, optimizers
from lpa_jax.models import MLP
from lpa_jax.perturbations import Site
from tests.helpers import toy
from tests.helpers.commands import parsed

LAYERS = ("input", "hidden1", "hidden2", "logits")
COUNTS = (100, 10, 1)


def built(method, options=None, **kwargs):
    return assemble(method, options or {}, layers=LAYERS, layer=None, counts=COUNTS, **kwargs)


def loss_of(stage):
    logits = jnp.array([[1.0, 0.5, -0.5]])
    return float(stage[1](logits, jnp.array([[0.0, 0.0, 1.0]]))[0]), logits


def test_erm_changes_nothing():
    assert built("erm") == ({}, {}, None, None, None)


def test_a_sum_joins_a_loss_perturbations_and_an_optimiser():
    options = {"logit_adjusted.tau": 2.0, "lpa.radius": 0.1, "sam.rho": 0.2}
    recipe = built("logit_adjusted+lpa+lpl+sam", options)
    assert list(recipe.perturbations) == ["hidden1", "logits"]
    assert recipe.sam_rho == 0.2
    ((first, _),) = recipe.loss_stages
    value, logits = loss_of(recipe.loss_stages[0])
    expected = losses.logit_adjusted(COUNTS, 2.0)(logits, jnp.array([[0.0, 0.0, 1.0]]))[0]
    assert first == 0 and value == pytest.approx(float(expected))


def test_ldam_is_re_weighted_after_its_share_of_the_epochs():
    stages = built("ldam_drw", {"ldam_drw.switch": 0.75}, epochs=20).loss_stages
    assert [first for first, _ in stages] == [0, 15]
    plain, weighted = (loss_of(stage)[0] for stage in stages)
    weights = losses.effective_number_weights(COUNTS)
    mean = np.average(weights, weights=COUNTS)
    assert weighted == pytest.approx(plain * weights[2] / mean, rel=1e-5)


def test_mixup_at_the_input_has_the_share_of_its_own_paper_unless_told_otherwise():
    def targets(options):
        site = Site(jnp.zeros((3, 2)), jnp.eye(3), jnp.arange(3), None, None, jax.random.key(4))
        return np.asarray(built("mixup", options).perturbations["input"].apply((), site).targets)

    np.testing.assert_array_equal(targets({}), targets({"mixup.alpha": 1.0}))
    assert (targets({}) != targets({"mixup.alpha": 2.0})).any()


@pytest.mark.parametrize("name", ["ldam", "ldam_drw"])
def test_ldam_is_scaled_for_the_head_in_front_of_it_unless_told_otherwise(name):
    target = jnp.array([[0.0, 0.0, 1.0]])
    for options, head, scale in (
        ({}, "linear", 1.0),
        ({}, "normalized", 30.0),
        ({f"{name}.scale": 7.0}, "normalized", 7.0),
    ):
        value, logits = loss_of(built(name, options, epochs=10, head=head).loss_stages[0])
        assert value == pytest.approx(float(losses.ldam(COUNTS, scale=scale)(logits, target)[0]))


def test_isda_refuses_a_head_whose_weights_it_cannot_read():
    with pytest.raises(ValueError, match=r"--head must be linear for isda.*got 'normalized'"):
        built("isda+lpa", head="normalized")


def test_posthoc_adjustment_subtracts_the_log_prior():
    adjusted = built("posthoc_logit_adjustment", {"posthoc_logit_adjustment.tau": 0.5})
    shift = adjusted.adjust_logits(jnp.zeros((1, 3)))[0]
    np.testing.assert_allclose(shift, -0.5 * np.log(np.array(COUNTS) / 111), rtol=1e-6)


def test_mixup_is_manifold_mixup_at_the_input():
    recipe = built("mixup", {"mixup.alpha": 0.3})
    assert recipe.perturbations["input"].name == "manifold_mixup"


def test_a_penalty_takes_the_last_hidden_layer_and_what_the_task_gives():
    recipe = built("coral+irm", num_domains=3)
    assert recipe.penalties["coral"].layers == ("hidden2",)
    assert built("coral@hidden1", num_domains=3).penalties["coral"].layers == ("hidden1",)
    assert recipe.penalties["irm"].layers == ()


def test_rsc_stands_at_the_last_hidden_layer_unless_its_name_says_otherwise():
    for layer in (None, "input"):
        options = methods.options_for("rsc+dropout", {}, {"layer": layer} if layer else {})
        recipe = assemble("rsc+dropout", options, layers=LAYERS, layer=layer, counts=COUNTS)
        assert {at: p.name for at, p in recipe.perturbations.items()} == {
            "hidden2": "rsc",
            layer or "hidden1": "dropout",
        }
    assert list(built("rsc@hidden1").perturbations) == ["hidden1"]
    assert "rsc.layer" not in search.draw("rsc", 0, search.HiddenLayers(LAYERS[1:-1]))


@pytest.mark.parametrize("name", methods.part_names())
def test_every_part_assembles_with_defaults_and_with_every_draw_of_the_search(name):
    built(name, num_domains=2, total_steps=10, epochs=10)
    for trial in range(5):
        options = search.draw(name, trial, search.HiddenLayers(LAYERS[1:-1]))
        known = (*methods.RUN_OPTIONS, *(f"{name}.{o}" for o in methods.part_options(name)))
        assert set(options) <= set(known)
        for key, value in options.items():
            methods.check_value(key, value)
        built(name, options, num_domains=2, total_steps=10, epochs=10)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("nonsense", "--methods: unknown method 'nonsense'"),
        ("erm+lpa", "--methods: erm is no part of a sum and has no layer, got 'erm\\+lpa'"),
        ("focal+ldam", "names several losses, focal and ldam"),
        ("sam@hidden1", "sam in 'sam@hidden1' takes no layer"),
        ("coral+coral", "--methods: coral in 'coral\\+coral' is named twice"),
        ("coral@hidden1+coral@hidden2", "coral@hidden2 in .* is named twice"),
        ("lpa@hidden1+lpa@hidden1", "lpa@hidden1 in 'lpa@hidden1\\+lpa@hidden1' is named twice"),
        ("lpa@hidden9", "unknown layer 'hidden9'; the injection points are"),
    ],
)
def test_bad_names_are_refused_in_one_line(method, message):
    with pytest.raises(ValueError, match=message):
        built(method)


def test_a_perturbation_may_stand_at_several_layers():
    recipe = built("mixstyle@hidden1+mixstyle@hidden2")
    assert list(recipe.perturbations) == ["hidden1", "hidden2"]


def test_an_option_reaches_its_part_only():
    options = methods.options_for("focal+sam", {}, {"focal.gamma": 3.0})
    assert options == {"focal.gamma": 3.0}
    with pytest.raises(
        ValueError, match=r"the option of focal in 'focal\.tau' must be one of gamma, got 'tau'"
    ):
        methods.options_for("focal", {}, {"focal.tau": 1})
    with pytest.raises(ValueError, match=r"--option: lpa\.layer must be text, got 3"):
        methods.options_for("lpa", {}, {"lpa.layer": 3})


TRACED = ("lpa+lpl", "adversarial", "dropout", "gaussian_noise", "manifold_mixup", "mixup", "sam",
          "label_smoothing", "focal", "logit_adjusted", "ldam_drw", "isda")  # fmt: skip


@pytest.mark.parametrize("method", TRACED)
def test_numbers_may_be_arguments_of_the_compiled_step(method):
    """Traced and known numbers build the same step: what a program does depends on no tracer."""
    batch = {"image": np.linspace(0, 1, 24, dtype=np.float32).reshape(6, 2, 2, 1)}
    batch = {"image": jnp.asarray(batch["image"]), "label": jnp.array([0, 0, 1, 1, 2, 0])}
    options = search.draw(method, 1, search.HiddenLayers(LAYERS[1:-1]))
    names = traceable(method, options)
    assert set(methods.RUN_OPTIONS) < set(names)
    model = MLP(num_classes=3, hidden=(4, 4))

    def mix(options):
        recipe = built(method, options, epochs=5, total_steps=10)
        optimizer = optimizers.sgd(options["learning_rate"], weight_decay=options["weight_decay"])
        optimizer = (
            optimizer if recipe.sam_rho is None else optimizers.sam(optimizer, recipe.sam_rho)
        )
        loss = recipe.loss_stages[-1][1] if recipe.loss_stages else losses.cross_entropy
        parts = {"perturbations": recipe.perturbations, "penalties": recipe.penalties}
        return optimizer, loss, parts

    optimizer, loss, parts = mix(options)
    state = lpa_jax.TrainState.create(model, optimizer, jax.random.key(0), batch, **parts)

    @jax.jit
    def traced_step(state, numbers):
        optimizer, loss, parts = mix(options | numbers)
        after, _ = lpa_jax.lpa_step(state.replace(optimizer=optimizer), batch, loss=loss, **parts)
        return after.params

    numbers = {name: jnp.float32(options[name]) for name in names}
    known, _ = jax.jit(functools.partial(lpa_jax.lpa_step, loss=loss, **parts))(state, batch)
    toy.assert_trees_close(traced_step(state, numbers), known.params)


def test_a_space_adds_an_option_or_replaces_a_range_and_changes_no_other_draw():
    hidden = search.HiddenLayers(LAYERS[1:-1])
    given = dict([search.parse_space("lpa.radius_target=0.03:2"),
                  search.parse_space("lpa.negative_scale=0.7|0.8")])  # fmt: skip
    for trial in range(8):
        usual = search.draw("lpa+lpl", trial, hidden)
        drawn = search.draw("lpa+lpl", trial, hidden, ranges=given)
        assert 0.03 <= drawn.pop("lpa.radius_target") <= 2
        assert drawn.pop("lpa.negative_scale") in (0.7, 0.8)
        assert drawn.items() <= usual.items() and set(usual) - set(drawn) == {"lpa.negative_scale"}
    assert search.draw("erm", 0, hidden, ranges=given) == search.draw("erm", 0, hidden)


@pytest.mark.parametrize(
    "text",
    ["lpa.radius", "lpa.nonsense=1:2", "nonsense=1:2", "lpa.radius=2:1", "lpa.radius=0:1",
     "lpa.radius=a:b", "lpa.radius=1:2:3"],
)  # fmt: skip
def test_a_bad_space_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=r"--space: .*") as error:
        search.parse_space(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods=erm", "--option=nonsense.rate=1"], "must be one of"),
        (["--methods=erm", "--option=lpa.raduis=1"], r"got 'raduis' \(did you mean 'radius'\?\)"),
        (["--methods=erm", "--option=lap.radius=1"], r"got 'lap' \(did you mean 'lpa'\?\)"),
        (["--methods=erm", "--option=lpa.radius=1"], r"--option=lpa.radius=1 must be an option of"),
        (["--methods=erm", "--radius=1"], "--radius must be an option of a method in"),
        (["--methods=lpa", "--lpl_radius=1"], "--lpl_radius must be an option of a method in"),
        (["--methods=lpa", "--option=focal.gamma=1"], "--option=focal.gamma=1 must be an option"),
        (
            ["--methods=ldam", "--loss=focal", "--option=focal.gamma=1"],
            "--methods=ldam --loss=focal",
        ),
        (["--methods=emr"], r"unknown method 'emr' in 'emr' \(did you mean 'erm'\?\)"),
        (["--methods=lpa", "--option=lpa.steps=1000000000000"], r"lpa.steps must be .* in 0..1000"),
        (["--methods=class_balanced", "--option=class_balanced.base=5"], "must be one of beta"),
    ],
)
def test_an_option_that_reaches_no_method_is_refused_by_name(arguments, message):
    with parsed(long_tail, arguments), pytest.raises(ValueError, match=message):
        compare.resolve_options({})


def test_options_reach_the_loss_of_methods_without_one_of_their_own():
    arguments = ["--methods=erm,ldam", "--loss=focal", "--option=focal.gamma=0", "--hparams=none"]
    with parsed(long_tail, arguments):
        options = compare.resolve_options({})
        settings = image_flags.settings()
    assert options == {"erm": {"focal.gamma": 0}, "ldam": {}}
    logits, labels = jnp.array([[1.0, 3.0]]), jnp.array([[1.0, 0.0]])
    value = settings.default_loss([1, 1], options["erm"])(logits, labels)
    np.testing.assert_array_equal(value, losses.cross_entropy(logits, labels))
    with pytest.raises(ValueError, match=r"focal.gamma must be finite and >= 0, got -3"):
        settings.default_loss([1, 1], {"focal.gamma": -3})


def test_a_job_of_a_sweep_forgets_the_options_of_other_methods():
    given = ["--radius=0.1", "--option=dropout.rate=0.3", "--option=lpa.steps=2"]
    with parsed(long_tail, ["--methods=lpl", *given]):
        flags.forget_unreached(["lpl"])
        assert compare.resolve_options({}) == {"lpl": {}}
    with parsed(long_tail, ["--methods=lpa", *given]):
        flags.forget_unreached(["lpa"])
        assert compare.resolve_options({}) == {"lpa": {"lpa.radius": 0.1, "lpa.steps": 2}}
