"""Claims of the staged models: published sizes, exact cuts, messages."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError
from numpy.testing import assert_allclose, assert_array_equal

from lpa_jax import models
from tests.helpers.tiny_models import (
    EVERY_FAMILY,
    RNGS,
    TINY,
    abstract_variables,
    normal,
    random_variables,
)


# CIFAR forms: arXiv 1512.03385 table 6 prints 0.27M, 0.46M, 0.85M, 1.7M; arXiv 1605.07146 table 4
# prints 11.0M and 36.5M. ImageNet forms: the torchvision and timm (deit) model cards.
@pytest.mark.parametrize(
    ("name", "num_classes", "size", "published"),
    [
        ("resnet20", 10, 32, 269_722),
        ("resnet32", 10, 32, 464_154),
        ("resnet56", 10, 32, 853_018),
        ("resnet110", 10, 32, 1_727_962),
        ("wrn_16_8", 10, 32, 10_961_370),
        ("wrn_28_10", 10, 32, 36_479_194),
        ("resnet18", 1000, 224, 11_689_512),
        ("resnet34", 1000, 224, 21_797_672),
        ("resnet50", 1000, 224, 25_557_032),
        ("vit_ti16", 1000, 224, 5_717_416),
        ("vit_s16", 1000, 224, 22_050_664),
        ("vit_l16", 1000, 224, 304_326_632),
    ],
)
def test_parameter_counts_are_the_published_ones(name, num_classes, size, published):
    params = abstract_variables(models.create(name, num_classes), size)["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == published


def multiply_adds(model, size):
    """Counts the multiply-adds of one image's convolutions and matrix products."""
    variables = abstract_variables(model, size)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    equations = list(jax.make_jaxpr(model.apply)(variables, image).eqns)
    total = 0
    for equation in equations:
        if equation.primitive.name == "custom_jvp_call":  # of `models.convolution`
            equations += equation.params["call_jaxpr"].eqns
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            kernel = equation.invars[1].aval.shape
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(kernel[:-1])
    return total


# torchvision's model cards: 1.814, 3.664 and 4.089 billion. With the stride of a bottleneck in its
# 1x1 convolution (v1) the last would be 3.8, so this also fixes where the stride stands.
@pytest.mark.parametrize(
    ("name", "published"), [("resnet18", 1.814), ("resnet34", 3.664), ("resnet50", 4.089)]
)
def test_imagenet_resnets_have_the_published_multiply_adds(name, published):
    assert multiply_adds(models.create(name, 1000), 224) / 1e9 == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_every_cut_equals_the_whole_network(name, images):
    model = TINY[name]

    def run(variables, x, start, stop):
        x, update = model.apply(
            variables, x, train=True, start=start, stop=stop, rngs=RNGS, mutable=["batch_stats"]
        )
        return x, {**variables, **update}

    @jax.jit
    def cut_everywhere(variables, x):
        whole = run(variables, x, "input", "logits")
        cuts = {
            layer: run(*reversed(run(variables, x, "input", layer)), layer, "logits")
            for layer in model.layers
        }
        return whole, cuts

    whole, cuts = cut_everywhere(random_variables(model), images)
    assert float(jnp.std(whole[0])) > 0.01
    for layer in model.layers:
        for of_cut, of_whole in zip(
            jax.tree.leaves(cuts[layer]), jax.tree.leaves(whole), strict=True
        ):
            assert_allclose(of_cut, of_whole, rtol=1e-5, atol=1e-6, err_msg=layer)


def test_start_equal_to_stop_is_the_identity(images):
    model = TINY["mlp"]
    for layer in model.layers:
        assert model.apply({}, images, start=layer, stop=layer) is images


def test_dropout_follows_its_rng_in_training_and_is_off_in_evaluation(images):
    model, variables = TINY["mlp"], random_variables(TINY["mlp"])

    @functools.partial(jax.jit, static_argnames="train")
    def run(seed, train):
        rngs = {"dropout": jax.random.key(seed, impl="unsafe_rbg")}
        return model.apply(variables, images, train=train, rngs=rngs)

    assert not np.allclose(run(0, train=True), run(1, train=True), atol=1e-3)
    assert_array_equal(run(0, train=False), run(1, train=False))


def test_a_resnet_drops_pooled_features_in_training_alone():
    model = models.ResNet(3, stage_sizes=(1,), widths=(64,), dropout=0.25)
    stage = jnp.arange(1.0, 5.0).reshape(1, 2, 2, 1) * jnp.ones((1, 1, 1, 64))
    pool = functools.partial(model.apply, {}, stage, start="stage1", stop="pool")
    assert_array_equal(pool(train=False), np.full((1, 64), 2.5, np.float32))
    dropped = pool(train=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(np.unique(dropped), [0, 2.5 / 0.75], rtol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "wrn_10_1", "vit"])
def test_dropout_needs_an_rng_in_training_only(name):
    model, variables = TINY[name], abstract_variables(TINY[name], 8)
    image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)

    def run(train):
        apply = functools.partial(model.apply, train=train, mutable=["batch_stats"])
        return jax.eval_shape(apply, variables, image)[0]

    assert run(train=False).shape == (2, 3)
    with pytest.raises(InvalidRngError, match='needs PRNG for "dropout"'):
        run(train=True)


def test_activation_shapes_follow_the_published_resolutions():
    model = models.ResNet50(1000)
    variables = abstract_variables(model, 224)
    image = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)

    def activations(variables, x):
        result = {}
        for below, above in zip(model.layers, model.layers[1:], strict=False):
            result[above] = x = model.apply(variables, x, start=below, stop=above)
        return result

    shapes = {k: v.shape[1:] for k, v in jax.eval_shape(activations, variables, image).items()}
    assert shapes == {
        "stem": (56, 56, 64),
        "stage1": (56, 56, 256),
        "stage2": (28, 28, 512),
        "stage3": (14, 14, 1024),
        "stage4": (7, 7, 2048),
        "pool": (2048,),
        "logits": (1000,),
    }


def test_padded_shortcut_subsamples_and_appends_zero_features():
    model = TINY["resnet8"].clone(zero_init=True)
    # With zero_init every residual starts at 0, so the stage is relu of its shortcut.
    variables = random_variables(model)
    norm = variables["params"]["stage2"]["block1"]["norm2"]
    norm.update(scale=jnp.zeros(8), bias=jnp.zeros(8))
    h = normal(4, 8, 8, 4)
    out = jax.jit(functools.partial(model.apply, start="stage1", stop="stage2"))(variables, h)
    kept = np.maximum(h, 0)[:, ::2, ::2]
    assert_array_equal(out, np.concatenate([kept, np.zeros_like(kept)], axis=-1))


def test_wide_shortcut_is_a_convolution_of_the_normalised_input():
    model = TINY["wrn_10_1"]
    variables = random_variables(model)
    block = variables["params"]["stage2"]["block1"]
    block["conv2"]["kernel"] = jnp.zeros_like(block["conv2"]["kernel"])
    h = normal(4, 8, 8, 16)
    out = jax.jit(functools.partial(model.apply, start="stage1", stop="stage2"))(variables, h)
    norm = {**block["norm1"], **variables["batch_stats"]["stage2"]["block1"]["norm1"]}
    scale, bias, mean, var = (np.asarray(norm[key]) for key in ("scale", "bias", "mean", "var"))
    y = np.maximum((np.asarray(h) - mean) / np.sqrt(var + 1e-5) * scale + bias, 0)
    expected = y[:, ::2, ::2] @ np.asarray(block["shortcut_conv"]["kernel"])[0, 0]
    assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_vit_puts_the_class_token_first_and_pools_it(images):
    model = TINY["vit"]
    variables = random_variables(model)
    embed, norm = variables["params"]["embed"], variables["params"]["pool"]["norm"]
    patches = np.asarray(images).reshape(4, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(4, 4, -1)
    kernel = np.asarray(embed["conv"]["kernel"]).reshape(-1, 8)
    tokens = patches @ kernel + np.asarray(embed["conv"]["bias"])
    token = np.broadcast_to(embed["token"], (4, 1, 8))
    expected = np.concatenate([token, tokens], axis=1) + np.asarray(embed["positions"])
    h = jax.jit(functools.partial(model.apply, stop="embed"))(variables, images)
    assert_allclose(h, expected, rtol=1e-4, atol=1e-5)

    first = np.asarray(h)[:, 0]
    centred = first - first.mean(axis=-1, keepdims=True)
    normalised = centred / np.sqrt(first.var(axis=-1, keepdims=True) + 1e-6)
    expected = normalised * np.asarray(norm["scale"]) + np.asarray(norm["bias"])
    out = jax.jit(functools.partial(model.apply, start="block2", stop="pool"))(variables, h)
    assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_zero_init_zeroes_the_last_scale_of_each_block_only(images):
    model = models.ResNet8(3, widths=(2,), stage_sizes=(1,), zero_init=True)

    @jax.jit
    def initial_scales(key):
        block = model.init(key, images)["params"]["stage1"]["block1"]
        return block["norm1"]["scale"], block["norm2"]["scale"]

    first, last = initial_scales(jax.random.key(0))
    assert_array_equal(first, np.ones(2))
    assert_array_equal(last, np.zeros(2))


def test_equal_models_are_one_static_argument():
    # Lists from a command line and names of types must not cause a second compilation.
    first = models.create("mlp", 3, hidden=[4, 5], dtype="bfloat16")
    second = models.MLP(3, hidden=(4, 5), dtype=jnp.bfloat16)
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize("name", models.names())
def test_every_name_makes_a_chain_from_input_to_logits(name):
    layers = models.create(name, 5).layers
    assert layers[0] == "input"
    assert layers[-1] == "logits"
    assert len(set(layers)) == len(layers)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"start": "stage9"}, "start must be one of input, hidden1, hidden2, logits, got 'stage9'"),
        ({"stop": "pool"}, "stop must be one of input, hidden1, hidden2, logits, got 'pool'"),
        (
            {"start": "hidden2", "stop": "hidden1"},
            "stop must be one of hidden2, logits, got 'hidden1'",
        ),
    ],
)
def test_a_bad_segment_is_refused_with_the_names(call, message, images):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        TINY["mlp"].apply(random_variables(TINY["mlp"]), images, **call)


def test_initialising_a_part_is_refused(images):
    with pytest.raises(
        ValueError,
        match="must span the whole network at initialisation, got start='input', stop='hidden1'",
    ):
        TINY["mlp"].init(jax.random.key(0), images, stop="hidden1")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet21", {}, "model must be one of mlp, small_cnn, resnet8, "),
        ("mlp", {"widths": (3,)}, "option of model 'mlp' must be one of hidden, dropout, "),
        ("mlp", {"parent": None}, "option of model 'mlp' must be one of hidden, dropout, "),
        ("mlp", {"hidden": ()}, "hidden must be one or more whole numbers >= 1, got ()"),
        ("mlp", {"hidden": (4, 0)}, "hidden must be one or more whole numbers >= 1, got (4, 0)"),
        ("mlp", {"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ("mlp", {"head": "cosine"}, "head must be one of linear, normalized, got 'cosine'"),
        ("mlp", {"dtype": "int32"},
         "dtype must be a floating type such as float32 or bfloat16, got 'int32'"),
        ("mlp", {"dtype": "float17"},
         "dtype must be a floating type such as float32 or bfloat16, got 'float17'"),
        ("small_cnn", {"norm": "layer"}, "norm must be one of batch, group, none, got 'layer'"),
        ("small_cnn", {"norm_epsilon": 0.0}, "norm_epsilon must be finite and > 0, got 0.0"),
        ("resnet8", {"stem": "mnist"}, "stem must be one of cifar, strided, imagenet, got 'mnist'"),
        ("resnet8", {"widths": (4, 8)},
         "widths must be one for each of stage_sizes=(1, 1, 1), got (4, 8)"),
        ("resnet8", {"norm": "none", "zero_init": True},
         "norm must be batch or group with zero_init=True, got 'none'"),
        ("wide_resnet", {"depth": 20}, "depth must be 6n + 4 for a whole number n >= 1, got 20"),
        ("vit", {"heads": 5}, "width must be a multiple of heads=5, got 192"),
    ],
)  # fmt: skip
def test_a_bad_option_is_refused_in_one_line(name, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        models.create(name, 10, **options)
    assert "\n" not in str(error.value)


def test_bad_num_classes_and_indivisible_images_are_refused(images):
    with pytest.raises(ValueError, match="num_classes must be a whole number >= 1, got 0"):
        models.create("mlp", 0)
    with pytest.raises(ValueError, match="patch must divide the image size 8 x 8, got 3"):
        models.ViT(3, patch=3).init(jax.random.key(0), images)


def test_the_slim_resnet_halves_resolution_and_widths_from_its_stem_on():
    model = models.ResNet8Slim(10)
    variables = abstract_variables(model, 28)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 19_218
    shapes = [
        jax.eval_shape(lambda v, x, stop=layer: model.apply(v, x, stop=stop), variables,
                       jax.ShapeDtypeStruct((2, 28, 28, 3), jnp.float32)).shape
        for layer in ("stem", "stage3")
    ]  # fmt: skip
    assert shapes == [(2, 14, 14, 8), (2, 4, 4, 32)]
