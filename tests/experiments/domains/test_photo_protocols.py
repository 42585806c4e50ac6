"""Photographs as DomainBed trains on them: pretrained weights, frozen norms, augmentation."""

import json
import pathlib

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from experiments import domain_generalization
from experiments.domains.data import DomainSource
from experiments.domains.settings import DomainSettings
from experiments.images.data import ImageTask
from experiments.images.settings import Settings
from experiments.runtime import fields
from experiments.training.program import Program
from experiments.training.settings import RunSettings
from lpa_jax import data, models
from lpa_jax.models import pretrained
from tests.helpers.module_call import call
from tests.lpa_jax.models.test_models_pretrained import made_tensors

DOMAINS = ("Caltech101", "LabelMe", "SUN09", "VOC2007")
SIZE = 32
PHOTOS = "resized_crop+flip+jitter+grayscale"
TINY = ("--dataset=VLCS", f"--image_size={SIZE}", "--model=resnet18", "--methods=erm",
        "--num_seeds=1", "--test_domains=LabelMe", "--train_steps=2", "--evaluate_every=1",
        "--batch_size=2",
        "--compilation_cache=", "--quiet", f"--augmentation={PHOTOS}",
        "--freeze_batch_norm")  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """VLCS in small: two images of each of five classes in each domain, and ResNet-18 weights."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for domain in DOMAINS:
        for label in ("bird", "car", "chair", "dog", "person"):
            folder = root / "VLCS" / domain / label
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    tensors = made_tensors(models.ResNet18(1000), num_classes=1000)
    safetensors.numpy.save_file(tensors, root / "resnet18.safetensors")
    safetensors.numpy.save_file({"fc.bias": tensors["fc.bias"]}, root / "head.safetensors")
    return root


def read(path):
    return json.loads(pathlib.Path(path).read_text())


@pytest.mark.slow
def test_domain_generalization_trains_from_a_file_of_weights_with_frozen_norms(photos, tmp_path):
    flags = (*TINY, f"--data_dir={photos}", f"--workdir={tmp_path / 'job'}")
    file = photos / "resnet18.safetensors"
    message, out = call(domain_generalization, *flags, f"--pretrained={file}")
    assert message is None and "erm" in out
    config = read(tmp_path / "job/runs/erm/test_LabelMe/seed_0/config.json")
    weights = pretrained.read(file)
    assert config["settings"]["pretrained"] == weights.sha256
    assert config["settings"]["freeze_batch_norm"] is True
    assert "crop_scale" not in config["settings"], "at its default"
    result = read(tmp_path / "job/runs/erm/test_LabelMe/seed_0/result.json")
    assert result["complete"] and [record["step"] for record in result["records"]] == [1, 2]
    # The same weights elsewhere are the same run; others are another one.
    moved = tmp_path / "elsewhere"
    moved.write_bytes(file.read_bytes())
    times = [path.stat().st_mtime_ns for path in tmp_path.glob("job/trainings/**/training.json")]
    message, _ = call(domain_generalization, *flags, f"--pretrained={moved}")
    assert message is None and times == [
        path.stat().st_mtime_ns for path in tmp_path.glob("job/trainings/**/training.json")
    ]
    tensors = dict(weights.tensors) | {"bn1.bias": np.ones(64, np.float32)}
    safetensors.numpy.save_file(tensors, moved)
    message, _ = call(domain_generalization, *flags, f"--pretrained={moved}")
    assert "pretrained: " in message and "choose another --workdir" in message


def test_both_protocols_start_from_the_weights(photos):
    weights = pretrained.read(photos / "resnet18.safetensors")
    common = {"model": "resnet18", "pretrained": weights, "freeze_batch_norm": True,
              "augmentation": PHOTOS, "batch_size": 2}  # fmt: skip
    settings = DomainSettings(dataset="VLCS", data_dir=str(photos), image_size=SIZE, train_steps=2,
                              evaluate_every=1, **common).check()  # fmt: skip
    program = Program("erm", {}, settings, DomainSource(settings).task(0, DOMAINS[:1]))
    images = np.zeros((4, SIZE, SIZE, 3), np.uint8)
    dataset = data.Dataset("small", images, np.arange(4), num_classes=5)
    task = ImageTask(dataset, dataset, data.IMAGENET_NORMALIZATION, np.arange(4))
    other = Program("erm", {}, Settings(profile="none", **common).check(), task)
    for state in (program.init(0), other.init(0)):
        model = getattr(state.network, "model", None) or state.network.network.model
        assert model.frozen_norm
        loaded = pretrained.convert(weights, model, (SIZE, SIZE, 3))
        assert "logits" not in loaded["params"]
        for path, leaf in jax.tree.leaves_with_path(loaded):
            found = state.variables
            for key in path:
                found = found[key.key]
            np.testing.assert_array_equal(found, leaf)
        assert state.params["logits"]["dense"]["kernel"].shape == (512, 5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--pretrained=nowhere"], "--pretrained: 'nowhere' cannot be read (No such file"),
        (["--pretrained=VLCS/LabelMe/car/0.png"], "0.png' is no whole safetensors file"),
        (["--pretrained=head.safetensors"],
         "--pretrained: tensor 'bn1.bias' is missing (and 100 others of 102)"),
        (["--pretrained=resnet18.safetensors", "--model=resnet50"],
         "--pretrained: tensor 'layer1.0.bn3.bias' is missing"),
        (["--pretrained=resnet18.safetensors", "--model=vit_ti16", "--nofreeze_batch_norm"],
         "--pretrained: names are known for resnet18, resnet34 and resnet50"),
        (["--pretrained=resnet18.safetensors", "--model=mlp"],
         "--freeze_batch_norm: option of model 'mlp' must be one of"),
        ([], "--freeze_batch_norm needs --pretrained"),
        (["--crop_scale=1,0.5"], "--crop_scale: scale must be two numbers, 0 < low <= high"),
        (["--crop_scale=a,b"], "--crop_scale must be numbers, got 'a,b'"),
        (["--jitter=0.4"], "--jitter must be 4 numbers, got (0.4,)"),
        (["--jitter=0.1,0.1,0.1,0.9"], "--jitter: hue must be in [0, 0.5], got 0.9"),
        (["--grayscale_probability=2"], "--grayscale_probability must be in [0, 1], got 2.0"),
        (["--augmentation=blur"], "--augmentation: augmentation must be none or a chain of crop,"),
    ],
)  # fmt: skip
def test_bad_flags_get_one_line_and_nothing_is_written(
    photos, refusal, monkeypatch, arguments, expected
):
    monkeypatch.chdir(photos)
    if arguments and not arguments[0].startswith("--pretrained"):
        arguments = [*arguments, "--nofreeze_batch_norm"]
    flags = (*TINY, f"--data_dir={photos}", *arguments)
    assert expected in refusal("domain_generalization", *flags)


def test_colours_that_images_do_not_have_are_refused_before_anything_is_written(refusal):
    flags = ("--dataset=ColoredMNIST", "--model=mlp", "--quiet", "--augmentation=grayscale")
    message = refusal("domain_generalization", *flags)
    assert "--augmentation: images must have 1 or 3 channels" in message
    message = refusal("long_tail", "--dataset=digits", "--freeze_batch_norm")
    assert "--freeze_batch_norm needs --pretrained" in message


def test_synchronised_and_frozen_norms_exclude_each_other(photos):
    weights = pretrained.read(photos / "resnet18.safetensors")
    settings = Settings(
        model="resnet18", pretrained=weights, freeze_batch_norm=True, sync_batch_norm=True
    )
    with pytest.raises(ValueError, match="--sync_batch_norm: --freeze_batch_norm leaves nothing"):
        settings.check()


@pytest.mark.parametrize("kind", [Settings, DomainSettings])
def test_runs_without_the_new_settings_are_described_as_before(kind):
    new = set(fields.left_out(RunSettings()))
    assert len(new) == 10 and not new & set(kind().as_dict())
    changed = kind(jitter=(0.1, 0.1, 0.1, 0.1), grayscale_probability=0.2, crop_scale=(0.5, 1.0))
    assert new & set(changed.as_dict()) == {"jitter", "grayscale_probability", "crop_scale"}
