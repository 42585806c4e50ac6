"""What both protocols promise, as commands and without a command line."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from absl import flags

from experiments import long_tail
from experiments.domains import data as domain_data
from experiments.domains.settings import DomainSettings
from experiments.images import data as image_data
from experiments.images.settings import Settings
from experiments.training import flags as run_flags
from experiments.training import run as runner
from experiments.training.task import digests
from lpa_jax import data, parallel
from lpa_jax.training import loop
from lpa_jax.training.interrupts import InterruptedRunError
from tests.helpers import drawn_texts
from tests.helpers.commands import parsed
from tests.helpers.module_call import call_by_name
from tests.helpers.protocols import PROTOCOLS, DomainRuns, ImageRuns
from tests.helpers.toy import assert_trees_equal

FLAGS = flags.FLAGS
JOB = ("--methods=lpa", "--num_seeds=2", "--steps=1", "--quiet")
FIXED = {"lpa.assignment": "confidence", "lpa.steps": 1, "lpa.radius_target": 0.2}
WEAK = FIXED | {"learning_rate": 1e-3, "lpa.radius": 0.1}
STRONG = FIXED | {"learning_rate": 1e-2, "lpa.radius": 0.7}
BOTH = pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.compare)


@pytest.fixture(scope="module", params=PROTOCOLS, ids=lambda protocol: protocol.compare)
def job(request, data_dir, tmp_path_factory):
    """The flags of a small job, which has finished, and its working folder."""
    protocol = request.param
    arguments = (protocol.compare, *protocol.tiny, *JOB)
    workdir = tmp_path_factory.mktemp(protocol.compare) / "job"
    with drawn_texts.undrawn():
        assert call_by_name(data_dir, *arguments, f"--workdir={workdir}") is None
    return arguments, workdir


@pytest.fixture(scope="module", params=[ImageRuns, DomainRuns])
def runs(request, data_dir):
    return request.param(data_dir)


# Both protocols run the same program; without -m slow one of them shows it.
quick_on_images = pytest.mark.parametrize(
    "runs", [ImageRuns, pytest.param(DomainRuns, marks=pytest.mark.slow)], indirect=True
)


def read(path):
    """A result or a record of one network, without times."""
    content = json.loads(pathlib.Path(path).read_text())
    del content["seconds"]
    for row in content.get("curve", ()):
        del row["examples_per_second"]
    return content


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name != "examples_per_second"}
        for line in lines
    ]


def test_finished_runs_are_read_and_those_cut_short_are_made_again(run, job):
    arguments, workdir = job
    finished = sorted((*workdir.rglob("result.json"), *workdir.rglob("training.json")))
    last = max(workdir.rglob("result.json"))
    cut = {last, *workdir.glob("trainings/lpa/without_-90%/seed_1/*/training.json")}
    before = {path: read(path) for path in finished}
    for path in cut:
        path.write_text(path.read_text()[:50])
    times = {path: path.stat().st_mtime_ns for path in finished}
    message, _, err = run(*arguments, "--noquiet", f"--workdir={workdir}")
    assert message is None
    for path in cut:
        line = f"{path} is cut short or not JSON: it will be written again\n"
        assert err.count(line) == 1
    assert err.count("is cut short") == len(cut)
    for path in finished:
        assert (path.stat().st_mtime_ns == times[path]) == (path not in cut)
        assert read(path) == before[path], "the same command and seed must give the same numbers"


def test_other_settings_in_the_same_workdir_are_refused_by_name(run, job):
    (experiment, *arguments), workdir = job
    message, *_ = run(experiment, *arguments, f"--workdir={workdir}", "--crop_padding=3")
    assert "crop_padding: 2 there, 3 here" in message and "choose another --workdir" in message


def test_a_changed_data_set_is_refused_and_runs_of_the_first_release_are_read(
    run, job, tmp_path, monkeypatch
):
    arguments, finished = job
    workdir = shutil.copytree(finished, tmp_path / "job")
    command = (*arguments, f"--workdir={workdir}")
    module = domain_data if arguments[0].startswith("domain") else image_data
    digests = module.digests
    monkeypatch.setattr(
        module, "digests", lambda part, of: digests(part, of) | {f"{part} labels": "corrected"}
    )
    message, *_ = run(*command)
    assert re.search(r"holds a run on other data \(.* labels: .* there, corrected here", message)
    for path in (*workdir.rglob("config.json"), *workdir.rglob("training_config.json")):
        content = json.loads(path.read_text())
        del content["data"]
        path.write_text(json.dumps(content))
    results = {path: path.read_text() for path in workdir.rglob("result.json")}
    assert run(*command)[0] is None
    assert results == {path: path.read_text() for path in workdir.rglob("result.json")}


def test_a_digest_notices_labels_contents_in_memory_and_sizes_of_files(tmp_path):
    pixels, labels = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1), np.array([0, 1])
    (tmp_path / "a.png").write_bytes(b"12")
    (tmp_path / "b.png").write_bytes(b"123")

    def of_memory(pixels, labels):
        return digests("train", data.Dataset("toy", pixels, labels, 2))

    def of_files(names, labels):
        return digests("train", data.open_image_files("toy", tmp_path, names, labels, 2))

    def differing(one, other):
        return {name for name in one if one[name] != other[name]}

    assert differing(of_memory(pixels, labels), of_memory(pixels + 1, labels)) == {"train images"}
    assert differing(of_memory(pixels, labels), of_memory(pixels, 1 - labels)) == {"train labels"}
    before = of_files(["a.png", "b.png"], labels)
    assert differing(before, of_files(["a.png", "b.png"], 1 - labels)) == {"train labels"}
    assert differing(before, of_files(["b.png", "a.png"], labels)) == {"train images"}
    (tmp_path / "b.png").write_bytes(b"1234")
    assert differing(before, of_files(["a.png", "b.png"], labels)) == {"train images"}


def test_what_is_allowed_and_hardly_meant_is_said(capsys):
    with parsed(long_tail, []):
        run_flags.warn(64, 63, {"lpa": {"lpa.radius": 1e6}, "lpl": {"lpl.radius": 30.0}})
        run_flags.warn(64, 64, {"lpa": {"lpa.radius": 1.0}})
    assert capsys.readouterr().err.splitlines() == [
        "--batch_size=64 is above the 63 training images: steps repeat images",
        "lpa: lpa.radius=1e+06 is relative: 1e+06 times mean ||h||",
    ]


@pytest.mark.parametrize("settings", [Settings, DomainSettings])
def test_settings_of_jax_that_change_numbers_belong_to_a_run(settings):
    plain = settings().as_dict()
    with jax.enable_x64(True), jax.default_prng_impl("rbg"):
        changed = settings().as_dict()
    with jax.default_matmul_precision("float32"):
        precise = settings().as_dict()
    assert changed == plain | {"jax_enable_x64": True, "jax_default_prng_impl": "rbg"}
    assert precise == plain | {"jax_default_matmul_precision": "float32"}


@BOTH
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--methods=ermm"], "--methods: unknown method 'ermm'"),
        (["--methods=erm,erm"], "--methods must name different methods"),
        (["--methods=lpa@stage9"], "unknown layer 'stage9'; the injection points are: input, "),
        (["--methods=lpa@hidden1|nowhere"], "unknown layer 'nowhere'"),
        (["--layer=stage1", "--methods=lpa"], "unknown layer 'stage1'"),
        (["--seeds=-1"], "--seeds must be whole numbers in 0..2**32-1"),
        (["--seeds=1,1"], "--seeds must name different seeds"),
        (["--batch_size=0"], "--batch_size must be a whole number in 1..1048576, got 0"),
        (["--accumulate=0"], "--accumulate must be a whole number in 1..1048576, got 0"),
        (["--accumulate=7"], "--accumulate=7 must divide the"),
        (["--sync_batch_norm"], "--sync_batch_norm: option of model 'mlp' must be"),
        (["--dataset=nonsense"], "nonsense"),
        (["--model=resnet99"], "model"),
        (["--radius=-1"], "--radius must be finite and >= 0, got -1.0"),
        (["--lpl_radius=nan"], "--lpl_radius must be finite and >= 0, got nan"),
        (["--ema=-1"], "--ema must be in [0, 1), got -1.0"),
        (["--steps=-2"], "--steps must be a whole number in 0..1000, got -2"),
        (["--geometry=round"], "geometry"),
        (["--assignment=random"], "assignment"),
        (["--option=lpa.nonsense=1"], "the option of lpa in 'lpa.nonsense' must be one of"),
        (["--option=radius"], "--option must be PART.OPTION=VALUE"),
        (["--hparams=/nowhere.json"], "--hparams: cannot read"),
        (["--augmentation=blur"], "blur"),
        (["--learning_rate=-1"], "--learning_rate must be in [0, 1000], got -1.0"),
        (["--learning_rate=1e308"], "--learning_rate must be in [0, 1000]"),
        ([f"--evaluate_every={10**25}"], "--evaluate_every must be a whole number >= 1 and below"),
    ],
)
def test_bad_input_gets_one_line_that_names_it_and_nothing_is_written(
    refusal, protocol, arguments, expected
):
    assert expected in refusal(protocol.compare, *protocol.tiny, *arguments)


@BOTH
@pytest.mark.parametrize("argument", ["--trials=0", "--seeds=0", "--worker=1", "--output=/"])
def test_tuning_refuses_bad_input_before_anything_is_written(refusal, protocol, argument):
    assert argument.partition("=")[0] in refusal(protocol.tune, *protocol.tiny, argument)


# Without a command line from here on.


@quick_on_images
def test_numbers_are_arguments_of_one_compiled_program(runs, tmp_path):
    def place(*arguments, **changes):
        return runs.job(*arguments, **changes).program.place

    shared = place("lpa", WEAK)
    assert place("lpa", STRONG, seed=1) == shared
    assert place("lpa", WEAK | {"lpa.steps": 2}) != shared
    assert place("lpa", WEAK, jitter=(0.1, 0.1, 0.1, 0.1)) != shared
    losses = []
    # The program of weak numbers first, which must not be compiled in.
    for name, job in (("weak", runs.job("lpa", WEAK)), ("strong", runs.job("lpa", STRONG))):
        runner.run(job, tmp_path / name)
        losses.append([row["train/loss"] for row in rows(tmp_path / name)])
    alone = type(runs)(runs.settings.data_dir).job("lpa", STRONG)
    runner.run(alone, tmp_path / "alone")
    assert rows(tmp_path / "alone") == rows(tmp_path / "strong")
    assert losses[0] != losses[1], "numbers must reach the step"
    assert rows(tmp_path / "weak")[-1]["effect/hidden1/radius_scale/positive"] != 1


def test_options_that_differ_in_more_than_numbers_are_refused(runs):
    program = runs.job("lpa", WEAK).program
    with pytest.raises(ValueError, match="options of lpa differ in more than numbers"):
        program.with_options(WEAK | {"lpa.steps": 2})
    with pytest.raises(ValueError, match=r"radius must be .*, got -1.0"):
        program.with_options(WEAK | {"lpa.radius": -1.0})


@quick_on_images
def test_steps_take_the_states_memory_but_not_that_of_loaded_weights_or_of_numbers(
    runs, tmp_path, monkeypatch
):
    job, train, steps = runs.job("lpa", WEAK), loop.train, []
    job.program._loaded = {"params": job.program.init(9).params}
    # Not compiled, so that what jit may pass through, the loaded weights, certainly is.
    job.program._create = job.program._create.__wrapped__

    def noticed_train(state, stages, batches, *args, **kwargs):
        assert isinstance(batches[0], parallel.PlacedBatch)
        first = jax.tree.map(np.array, state.params)
        for after, record in train(state, stages, batches, *args, **kwargs):
            steps.append(record.step)
            yield after, record
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
        assert_trees_equal(job.program.init(0).params, first)

    monkeypatch.setattr(loop, "train", noticed_train)
    for name in "ab":
        runner.run(job, tmp_path / name)
    assert rows(tmp_path / "a") == rows(tmp_path / "b") and len(steps) == 4


@quick_on_images
def test_a_batch_in_parts_trains_the_network_of_the_whole_batch(runs, tmp_path):
    method = f"{runs.penalty}+lpa"
    found = []
    for parts in (1, 4):
        job = runs.job(method, WEAK, accumulate=parts)
        runner.run(job, tmp_path / str(parts))
        assert getattr(job.program.init(0).network, "micro_batches", 1) == parts
        found.append(rows(tmp_path / str(parts))[-1])
    penalty = f"train/penalty/{runs.penalty}"
    assert found[0][penalty] > 0
    for name in ("train/loss", penalty, "effect/hidden1/radius_scale/positive"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5), name


def test_a_run_that_is_stopped_resumes_to_the_same_result(runs, tmp_path):
    job = runs.job("lpa", WEAK, seed=3)
    runner.run(job, tmp_path / "whole")
    (whole,) = (tmp_path / "whole").glob(f"*{job.names.result}")
    for asked in (2, 6):  # before the first evaluation, and later
        left = [asked]

        def should_stop(left=left):
            left[0] -= 1
            return left[0] < 0

        folder = tmp_path / f"stopped_{asked}"
        with pytest.raises(InterruptedRunError):
            runner.run(job, folder, should_stop=should_stop)
        assert not (folder / job.names.result).exists()
        left[0] = 10**6
        runner.run(job, folder, should_stop=should_stop)
        assert read(folder / job.names.result) == read(whole)


def test_a_final_evaluation_that_is_missing_is_made_once(runs, tmp_path, monkeypatch):
    job = runs.job("lpa", WEAK, seed=3)
    evaluated, evaluate = [], runner.evaluate
    last = job.program.length.total_steps

    def noticed(job, state, *args):
        evaluated.append(int(state.step))
        return evaluate(job, state, *args)

    monkeypatch.setattr(runner, "evaluate", noticed)
    whole = runner.run(job, tmp_path / "whole")
    assert evaluated == [last // 2, last]
    evaluated.clear()
    with pytest.raises(InterruptedRunError):
        runner.run(job, tmp_path / "stopped", should_stop=lambda: last in evaluated)
    assert evaluated == [last // 2, last] and not (tmp_path / "stopped/result.json").exists()
    evaluated.clear()
    runner.run(job, tmp_path / "stopped")
    assert evaluated == [last]
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    runner.run(job, tmp_path / "stopped")
    assert evaluated == [last] and whole["complete"]
