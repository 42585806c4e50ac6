"""Claims of the staged models: published sizes, exact cuts, statistics, precision, messages."""

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

# Stand-ins for every model family, small enough to run op by op, with dropout where there is any.
TINY = {
    "mlp": models.MLP(3, hidden=(6, 5), dropout=0.5),
    "small_cnn": models.SmallCNN(3, widths=(4, 8)),
    "resnet8": models.ResNet8(3, widths=(4, 8, 16)),
    "bottleneck": models.ResNet50(3, widths=(4, 8), stage_sizes=(1, 1), stem="cifar"),
    "wrn_10_1": models.WideResNet(3, depth=10, width=1, dropout=0.5),
    "vit": models.ViT(3, patch=4, width=8, depth=2, heads=2, dropout=0.5),
}
# This generator compiles several times faster than the default one.
RNGS = {"dropout": jax.random.key(7, impl="unsafe_rbg")}


def normal(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def images():
    return normal(4, 8, 8, 3)


def abstract_variables(model, size):
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def random_variables(model, size=8):
    """Returns variables drawn by NumPy: initialisers take seconds to compile."""
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(generator.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        fan_in = math.prod(leaf.shape[:-1])
        return jnp.asarray(generator.normal(0, fan_in**-0.5, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(draw, abstract_variables(model, size))


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
    ],
)
def test_parameter_counts_are_the_published_ones(name, num_classes, size, published):
    params = abstract_variables(models.create(name, num_classes), size)["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == published


def multiply_adds(model, size):
    """Counts the multiply-adds of one image's convolutions and matrix products."""
    variables = abstract_variables(model, size)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    total = 0
    for equation in jax.make_jaxpr(model.apply)(variables, image).eqns:
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


@pytest.mark.parametrize("name", TINY)
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


def test_a_segment_updates_only_its_own_statistics():
    model = TINY["resnet8"]
    variables = random_variables(model)
    h = normal(4, 8, 8, 4)
    segment = jax.jit(
        functools.partial(
            model.apply, train=True, start="stage1", stop="stage2", mutable=["batch_stats"]
        )
    )
    before, after = variables["batch_stats"], segment(variables, h)[1]["batch_stats"]
    assert after.keys() == before.keys()
    for stage in after:
        equal = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), before[stage], after[stage])
        assert set(jax.tree.leaves(equal)) == {stage != "stage2"}, stage


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


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32(name):
    model = TINY[name].clone(dtype="bfloat16")
    variables = abstract_variables(model, 8)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)

    def run(stop):
        return jax.eval_shape(lambda v, x: model.apply(v, x, stop=stop), variables, image).dtype

    assert run("logits") == jnp.float32
    assert {run(layer) for layer in model.layers[1:-1]} == {jnp.dtype("bfloat16")}


def test_bfloat16_logits_are_near_the_float32_ones(images):
    model = TINY["small_cnn"]
    variables = random_variables(model)
    exact = jax.jit(model.apply)(variables, images)
    half = jax.jit(model.clone(dtype="bfloat16").apply)(variables, images)
    assert_allclose(half, exact, atol=0.05 * float(jnp.max(jnp.abs(exact))))
    assert not np.array_equal(half, exact)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_without_batch_norm_there_are_no_statistics_and_examples_are_independent(norm, images):
    model = models.SmallCNN(3, widths=(6, 10), norm=norm, groups=4)
    variables = random_variables(model)
    assert set(variables) == {"params"}
    run = jax.jit(functools.partial(model.apply, train=True))
    before, after = run(variables, images), run(variables, images.at[0].multiply(-2))
    assert_array_equal(before[1:], after[1:])
    assert not np.allclose(before[0], after[0])


def test_group_norm_normalises_over_gcd_groups(images):
    model = models.SmallCNN(3, widths=(6,), groups=4)
    variables = random_variables(model)
    conv, norm = (variables["params"]["stage1"][part] for part in ("conv", "norm"))
    y = np.asarray(
        jax.lax.conv_general_dilated(
            images,
            conv["kernel"],
            (2, 2),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    )
    groups = y.reshape(4, 4, 4, 2, 3)  # gcd(4, 6) = 2 groups of 3 features
    mean = groups.mean(axis=(1, 2, 4), keepdims=True)
    var = groups.var(axis=(1, 2, 4), keepdims=True)
    normalised = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(y.shape)
    expected = np.maximum(normalised * np.asarray(norm["scale"]) + np.asarray(norm["bias"]), 0)
    out = jax.jit(functools.partial(model.apply, stop="stage1"))(variables, images)
    assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_synchronised_batch_norm_uses_the_global_batch(images):
    # The two halves of the batch on two members of a mapped axis, against the whole batch.
    local = models.SmallCNN(3, widths=(4,), norm="batch")
    synchronised = local.clone(axis_name="devices")
    variables = random_variables(local)

    @functools.partial(jax.jit, static_argnums=0)
    def train(model, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    @functools.partial(jax.jit, static_argnums=0)
    def train_halves(model):
        halves = jnp.reshape(images, (2, 2, 8, 8, 3))
        logits, update = jax.vmap(functools.partial(train, model), axis_name="devices")(halves)
        return jnp.reshape(logits, (4, 3)), update

    logits, update = train(local, images)
    logits_halves, update_halves = train_halves(synchronised)
    assert_allclose(logits_halves, logits, rtol=1e-4, atol=1e-5)
    for leaf, leaf_halves in zip(
        jax.tree.leaves(update), jax.tree.leaves(update_halves), strict=True
    ):
        assert_allclose(leaf_halves, np.stack([leaf, leaf]), rtol=1e-5, atol=1e-6)
    assert not np.allclose(train_halves(local)[0], logits, atol=1e-3)


def test_synchronised_batch_norm_trains_under_pmap_and_evaluates_outside(images):
    local = models.SmallCNN(3, widths=(4,), norm="batch")
    synchronised = local.clone(axis_name="devices")
    variables = random_variables(local)
    train = jax.pmap(
        lambda v, x: synchronised.apply(v, x, train=True, mutable=["batch_stats"]),
        axis_name="devices",
        in_axes=(None, 0),
        out_axes=(0, None),
        devices=jax.devices()[:1],
    )
    logits, update = train(variables, images[None])
    apply = functools.partial(local.apply, train=True, mutable=["batch_stats"])
    expected, _ = jax.jit(apply)(variables, images)
    assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-5)
    trained = {**variables, **update}
    evaluated = jax.jit(synchronised.apply)(trained, images)
    assert_array_equal(evaluated, jax.jit(local.apply)(trained, images))


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
        ({"start": "stage9"}, "start='stage9' is not one of the layers ('input', 'hidden1', "),
        ({"stop": "pool"}, "stop='pool' is not one of the layers ('input', 'hidden1', "),
        ({"start": "hidden2", "stop": "hidden1"}, "stop='hidden1' comes before start='hidden2'"),
    ],
)
def test_a_bad_segment_is_refused_with_the_names(call, message, images):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        TINY["mlp"].apply(random_variables(TINY["mlp"]), images, **call)
    assert "'logits')" in str(error.value)


def test_initialising_a_part_is_refused(images):
    with pytest.raises(ValueError, match="initialisation needs the whole network"):
        TINY["mlp"].init(jax.random.key(0), images, stop="hidden1")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet21", {}, "model 'resnet21' is unknown; there are mlp, small_cnn, "),
        ("mlp", {"widths": (3,)}, "option 'widths' is unknown to the model 'mlp'; it has "),
        ("mlp", {"parent": None}, "option 'parent' is unknown to the model 'mlp'; it has "),
        ("mlp", {"hidden": ()}, "hidden=() must be made of integers above 0"),
        ("mlp", {"hidden": (4, 0)}, "hidden=(4, 0) must be made of integers above 0"),
        ("mlp", {"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ("mlp", {"dtype": "int32"}, "dtype='int32' is not a floating type"),
        ("mlp", {"dtype": "float17"}, "dtype='float17' is not a floating type"),
        ("small_cnn", {"norm": "layer"}, "norm='layer' is not one of ('batch', 'group', 'none')"),
        ("small_cnn", {"norm_epsilon": 0.0}, "norm_epsilon=0.0 must be above 0"),
        ("resnet8", {"stem": "mnist"}, "stem='mnist' is not one of ('cifar', 'strided', "),
        ("resnet8", {"widths": (4, 8)}, "widths=(4, 8) must have one entry for each of "),
        ("resnet8", {"norm": "none", "zero_init": True}, "zero_init=True needs a norm"),
        ("wide_resnet", {"depth": 20}, "depth=20 must be 6n + 4 for an integer n above 0"),
        ("vit", {"heads": 5}, "width=192 must be a multiple of heads=5"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(name, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        models.create(name, 10, **options)
    assert "\n" not in str(error.value)


def test_bad_num_classes_and_indivisible_images_are_refused(images):
    with pytest.raises(ValueError, match="num_classes=0 must be made of integers above 0"):
        models.create("mlp", 0)
    with pytest.raises(ValueError, match="patch=3 must divide the image size 8 x 8"):
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
