"""Pretrained weights: torch's layout into ours, against a plain NumPy network; frozen norms."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import lpa_jax
from lpa_jax import models
from lpa_jax.models import pretrained
from lpa_jax.training.state import replaced

SIZE, CLASSES = 32, 3
# Of the ImageNet form with all that differs between blocks, small: (model, torch's block counts).
BASIC = models.ResNet18(CLASSES, widths=(4, 6, 8, 10), stage_sizes=(1, 2, 1, 1))
BOTTLENECK = models.ResNet50(CLASSES, widths=(2, 3, 4, 5), stage_sizes=(2, 1, 1, 1))
IMAGES = np.random.default_rng(1).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)


def torch_shapes(model, num_classes=CLASSES):
    """Names and shapes as torchvision's ResNet has them, written down independently."""
    kernels = (3, 3) if model.block == "basic" else (1, 3, 1)
    widen = 1 if model.block == "basic" else 4
    shapes, below = {}, model.widths[0]

    def conv(name, above, size):
        shapes[f"{name}.weight"] = (above, below, size, size)

    def norm(name, width):
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{tensor}"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    shapes["conv1.weight"] = (below, 3, 7, 7)
    norm("bn1", below)
    for stage, (blocks, width) in enumerate(zip(model.stage_sizes, model.widths, strict=True)):
        for block in range(blocks):
            name, entering = f"layer{stage + 1}.{block}", below
            for number, size in enumerate(kernels):
                above = width * widen if number + 1 == len(kernels) else width
                conv(f"{name}.conv{number + 1}", above, size)
                norm(f"{name}.bn{number + 1}", above)
                below = above
            if block == 0 and entering != below:
                below, above = entering, below
                conv(f"{name}.downsample.0", above, 1)
                norm(f"{name}.downsample.1", above)
                below = above
    return shapes | {"fc.weight": (num_classes, below), "fc.bias": (num_classes,)}


def made_tensors(model, num_classes=CLASSES):
    generator = np.random.default_rng(0)

    def draw(name, shape):
        if name.endswith("num_batches_tracked"):
            return np.array(7, np.int64)
        if name.endswith("running_var"):
            return generator.uniform(0.5, 2, shape).astype(np.float32)
        scale = max(1, np.prod(shape[1:])) ** -0.5
        return generator.normal(1 if "bn" in name else 0, scale, shape).astype(np.float32)

    return {name: draw(name, shape) for name, shape in torch_shapes(model, num_classes).items()}


def weights(tensors):
    return pretrained.Weights(tensors, "")


def slow_conv(x, kernel, stride=1):
    """Cross-correlation with a torch kernel [F_out, F_in, k, k], padded by (k - 1) / 2."""
    size = kernel.shape[-1]
    pad = (size - 1) // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = ((length - size) // stride + 1 for length in x.shape[1:3])
    result = np.zeros((len(x), rows, columns, len(kernel)))
    for row, column in np.ndindex(rows, columns):
        top, left = row * stride, column * stride
        patch = x[:, top : top + size, left : left + size]
        result[:, row, column] = np.einsum("bhwi,oihw->bo", patch, kernel)
    return result


def slow_resnet(model, tensors, x):
    """The logits of torchvision's ResNet in evaluation mode, in float64."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def norm(x, name):
        mean, var, scale, bias = (
            tensors[f"{name}.{tensor}"]
            for tensor in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def relu(x):
        return np.maximum(x, 0)

    x = relu(norm(slow_conv(x, tensors["conv1.weight"], 2), "bn1"))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    half = (x.shape[1] + 1) // 2
    shifts = [padded[:, i : i + 2 * half : 2, j : j + 2 * half : 2][:, :half, :half]
              for i in range(3) for j in range(3)]  # fmt: skip
    x = np.max(shifts, axis=0)
    strided = 1 if model.block == "basic" else 2  # which convolution of a block has the stride
    for stage, blocks in enumerate(model.stage_sizes):
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            y = x
            for number in range(1, 3 if model.block == "basic" else 4):
                own = stride if number == strided else 1
                y = norm(slow_conv(relu(y) if number > 1 else y,
                                   tensors[f"{name}.conv{number}.weight"], own),
                         f"{name}.bn{number}")  # fmt: skip
            if f"{name}.downsample.0.weight" in tensors:
                x = slow_conv(x, tensors[f"{name}.downsample.0.weight"], stride)
                x = norm(x, f"{name}.downsample.1")
            x = relu(x + y)
    return x.mean((1, 2)) @ tensors["fc.weight"].T + tensors["fc.bias"]


@pytest.mark.parametrize("model", [BASIC, BOTTLENECK], ids=["basic", "bottleneck"])
def test_logits_are_those_of_a_plain_network_with_the_same_tensors(model):
    tensors = made_tensors(model)
    variables = pretrained.convert(weights(tensors), model, IMAGES.shape[1:])
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    logits = jax.jit(model.apply)(variables, IMAGES)
    expected = slow_resnet(model, tensors, IMAGES.astype(np.float64))
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


# torchvision's files hold 122 and 320 tensors, a counter for each of 20 and 53 norms among them.
@pytest.mark.parametrize(
    ("name", "tensors", "norms"),
    [("resnet18", 122, 20), ("resnet34", 218, 36), ("resnet50", 320, 53)],
)
def test_the_named_models_take_as_many_tensors_as_torchvision_has(name, tensors, norms):
    model = models.create(name, 1000)
    shapes = torch_shapes(model, 1000)
    counters = [tensor for tensor in shapes if tensor.endswith("num_batches_tracked")]
    assert (len(shapes), len(counters)) == (tensors, norms)
    assert set(dict(pretrained._places(model))) == set(shapes) - set(counters)


def test_a_head_for_other_classes_is_left_out_and_one_for_as_many_is_not():
    tensors = made_tensors(BASIC, num_classes=5)
    variables = pretrained.convert(weights(tensors), BASIC, IMAGES.shape[1:])
    assert "logits" not in variables["params"]
    np.testing.assert_array_equal(
        variables["batch_stats"]["stage2"]["block1"]["shortcut_norm"]["var"],
        tensors["layer2.0.downsample.1.running_var"],
    )
    variables = pretrained.convert(weights(tensors), BASIC.clone(num_classes=5), IMAGES.shape[1:])
    np.testing.assert_array_equal(
        variables["params"]["logits"]["dense"]["kernel"], tensors["fc.weight"].T
    )


def test_a_state_starts_from_the_variables_it_is_given_and_initialises_the_others():
    model, new = models.MLP(3, hidden=(4, 5)), {"params": {"hidden1": {"dense": {}}}}
    new["params"]["hidden1"]["dense"]["kernel"] = np.full((12, 4), 0.5, np.float32)
    batch = {"image": jnp.ones((2, 2, 2, 3)), "label": jnp.zeros(2, jnp.int32)}
    create = functools.partial(lpa_jax.TrainState.create, model, optax.sgd(0.1))
    plain = create(jax.random.key(3), batch)
    loaded = create(jax.random.key(3), batch, variables=new)
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(loaded.params), jax.tree.leaves(plain.params), strict=True
    ):
        expected = (
            0.5
            if jax.tree_util.keystr(path, simple=True, separator="/") == ("hidden1/dense/kernel")
            else other
        )
        np.testing.assert_array_equal(leaf, expected)


def test_variables_without_a_place_are_refused():
    with pytest.raises(ValueError, match="variables have no 'stage9' to be replaced"):
        replaced({"params": {"stem": 1}}, {"params": {"stage9": 2}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer2.0.conv1.weight": None}, "tensor 'layer2.0.conv1.weight' is missing$"),
        ({"fc.bias": None, "bn1.bias": None}, "tensor 'bn1.bias' is missing .and 1 others of 7"),
        ({"layer5.0.conv1.weight": np.zeros(1)}, "tensor 'layer5.0.conv1.weight' is unexpected"),
        ({"conv1.weight": np.zeros((4, 1, 7, 7), np.float32)},
         "tensor 'conv1.weight' has shape (4, 1, 7, 7), must have (4, 3, 7, 7)"),
        ({"fc.weight": np.zeros((CLASSES, 7), np.float32)},
         "tensor 'fc.weight' has shape (3, 7), must have (3, 10)"),
        ({"fc.weight": np.zeros((9, 7), np.float32), "fc.bias": np.zeros(9, np.float32)},
         "tensor 'fc.weight' has shape (9, 7), must have (9, 10)"),
        ({"bn1.weight": np.full(4, np.nan, np.float32)}, "tensor 'bn1.weight' has a number that"),
        ({"bn1.bias": np.full(4, np.inf, np.float32)}, "tensor 'bn1.bias' has a number that"),
        ({"bn1.running_var": -np.ones(4, np.float32)}, "tensor 'bn1.running_var' has a negative"),
        ({"bn1.bias": np.zeros(4, np.int32)}, "tensor 'bn1.bias' has type int32, must be floating"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named_in_one_line(change, message):
    tensors = made_tensors(BASIC) | change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    message = message if message.endswith("$") or " .and" in message else re.escape(message)
    with pytest.raises(ValueError, match=f"^{message}") as error:
        pretrained.convert(weights(tensors), BASIC, IMAGES.shape[1:])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "model",
    [models.MLP(3), models.ResNet8(3), models.ResNet18(3, norm="group"),
     models.ResNet18(3, stem="cifar")],
    ids=["mlp", "resnet8", "group norm", "cifar stem"],
)  # fmt: skip
def test_models_without_these_names_are_refused(model):
    with pytest.raises(ValueError, match="names are known for resnet18, resnet34 and resnet50"):
        pretrained.convert(weights({}), model, (32, 32, 3))


def test_a_file_is_read_as_it_was_written_and_known_by_its_content(tmp_path):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)}
    for name in ("first", "copy"):
        safetensors.numpy.save_file(tensors, tmp_path / name)
    safetensors.numpy.save_file(tensors | {"b": np.zeros(2, np.float16)}, tmp_path / "other")
    first, copy, other = (pretrained.read(tmp_path / name) for name in ("first", "copy", "other"))
    np.testing.assert_array_equal(first.tensors["a"], tensors["a"])
    assert first == copy and first != other and len(first.sha256) == 64
    with pytest.raises(ValueError, match="read-only"):
        first.tensors["a"][0] = 1


def test_files_that_are_missing_or_broken_get_one_line(tmp_path):
    whole = safetensors.numpy.save({"a": np.ones(100, np.float32)})
    header = b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    contents = {
        "half": whole[:-50],
        "start": whole[:20],
        "empty": b"",
        "text": b"no weights, but a longer text than eight bytes",
        "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94.",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is no whole safetensors file") as error:
            pretrained.read(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "half precision").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(ValueError, match="holds numbers of type 'BF16'"):
        pretrained.read(tmp_path / "half precision")
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match=r"cannot be read \("):
            pretrained.read(path)


FROZEN = models.SmallCNN(CLASSES, widths=(4, 6), norm="batch", frozen_norm=True)


@functools.cache
def frozen_step():
    """A state with statistics that training would change, the next one, and the batch."""
    batch = {"image": jnp.asarray(IMAGES[:, :8, :8]), "label": jnp.array([0, 2])}
    norm = {stage: {"norm": {"mean": np.full(width, 0.3, np.float32)}}
            for stage, width in (("stage1", 4), ("stage2", 6))}  # fmt: skip
    perturbations = {"stage1": lpa_jax.lpa(radius=0.1, steps=1, assignment=lpa_jax.all_positive())}
    before = lpa_jax.TrainState.create(
        FROZEN,
        optax.sgd(0.1),
        jax.random.key(0),
        batch,
        perturbations,
        variables={"batch_stats": norm},
    )
    step = jax.jit(functools.partial(lpa_jax.lpa_step, perturbations=perturbations))
    return before, step(before, batch)[0], batch


def test_frozen_norms_keep_their_statistics_and_train_their_scales_and_biases():
    before, after, _ = frozen_step()
    statistics = (state.model_state["batch_stats"] for state in (before, after))
    for leaf, other in zip(*map(jax.tree.leaves, statistics), strict=True):
        np.testing.assert_array_equal(leaf, other)
    for path, leaf in jax.tree.leaves_with_path(before.params):
        changed = after.params
        for key in path:
            changed = changed[key.key]
        assert not np.array_equal(leaf, changed), jax.tree_util.keystr(path)


def test_frozen_norms_normalise_by_running_statistics_in_training():
    before, _, batch = frozen_step()

    @functools.partial(jax.jit, static_argnames=("frozen", "train"))
    def run(frozen, train):
        model = FROZEN.clone(frozen_norm=frozen)
        apply = functools.partial(model.apply, train=train, mutable=["batch_stats"])
        return apply(before.variables, batch["image"])[0]

    frozen = run(frozen=True, train=True)
    np.testing.assert_array_equal(frozen, run(frozen=True, train=False))
    np.testing.assert_array_equal(frozen, run(frozen=False, train=False))
    assert not np.allclose(frozen, run(frozen=False, train=True), atol=1e-2)


def test_frozen_norms_need_batch_norms():
    with pytest.raises(ValueError, match="norm must be batch with frozen_norm=True, got 'group'"):
        models.create("resnet18", 3, norm="group", frozen_norm=True)
