"""Checkpoints: what comes back is what went in, and damage of any kind is found and named."""

import dataclasses
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lpa_jax
from lpa_jax.checkpoints import arrays as array_files
from lpa_jax.checkpoints import checkpoints as checkpoint
from lpa_jax.checkpoints import manifest
from lpa_jax.checkpoints.checkpoints import CheckpointError, Checkpoints

CONFIG = {"method": "lpa", "settings": {"learning_rate": 0.1, "epochs": 2}}
FLIPS = 2  # bit flips a file; the stress suite makes 10


def make_state(seed=0):
    """A state with every kind of leaf: keys, counters, moments, carried perturbations, no entry."""
    batch = {"image": np.zeros((4, 2, 2, 1), np.float32), "label": np.arange(4) % 3}
    state = lpa_jax.TrainState.create(
        lpa_jax.models.MLP(num_classes=3, hidden=(5,)),
        optax.adam(0.1),
        jax.random.key(seed),
        batch,
        {"hidden1": lpa_jax.lpa(0.2, mode="carry")},
    )
    extra = {"half": jnp.arange(3, dtype=jnp.bfloat16) + seed, "none": jnp.zeros((0, 2)),
             "flag": jnp.asarray(seed == 0), "key": jax.random.key(seed + 7)}  # fmt: skip
    return state.replace(model_state=extra)


TOTALS = {"loss": (jnp.float32(0.1), jnp.float32(3)), "effect/a": (jnp.ones(2), jnp.ones(2))}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with checkpoints of steps 10 and 20; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    checkpoints = Checkpoints(folder, config=CONFIG)
    for step in (10, 20):
        checkpoints.save(step, make_state(step), TOTALS, {"rows": [{"epoch": step}]})
    return folder


@pytest.fixture
def copy(two_steps, tmp_path):
    return pathlib.Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


@pytest.fixture(scope="module")
def template():
    return make_state()


def restore(folder, template, config=CONFIG):
    return Checkpoints(folder, config=config).restore(template)


def newest(folder):
    return folder / "step_000000020"


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def assert_same(one, other):
    one, other = array_files.flatten("state", one), array_files.flatten("state", other)
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert one[name].tobytes() == other[name].tobytes(), name


def test_every_leaf_comes_back_bit_for_bit(two_steps, template):
    restored = restore(two_steps, template)
    assert (restored.step, restored.rejected) == (20, ())
    assert_same(restored.state, make_state(20))
    assert restored.state.rng.dtype == template.rng.dtype
    assert set(restored.totals) == set(TOTALS)
    jax.tree.map(np.testing.assert_array_equal, dict(restored.totals), TOTALS)
    assert restored.notes == {"rows": [{"epoch": 20}]}


def test_an_empty_folder_holds_no_checkpoint(tmp_path, template):
    assert restore(tmp_path / "nowhere", template) is None
    assert not (tmp_path / "nowhere").exists()


def each_fault(path, rng):
    """Ways to damage a file, the last few of them random bit flips."""
    content = path.read_bytes()
    yield "missing", path.unlink
    for size in {0, len(content) // 2, len(content) - 1} - {len(content)}:
        yield f"cut to {size} bytes", lambda size=size: path.write_bytes(content[:size])
    for _ in range(FLIPS if content else 0):
        bit = int(rng.integers(8 * len(content)))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} flipped", lambda flipped=flipped: path.write_bytes(bytes(flipped))


def test_damage_to_any_file_is_found_and_the_step_before_is_used(copy, template):
    rng = np.random.default_rng(0)
    tried = 0
    for path in files_of(newest(copy)):
        content = path.read_bytes()
        for name, damage in each_fault(path, rng):
            damage()
            checkpoints = Checkpoints(copy, config=CONFIG)
            restored = checkpoints.restore(template)
            # White space in the manifest may change without harm.
            harmless = path.name == manifest.NAME and restored.step == 20
            if harmless:
                assert json.loads(path.read_text()) == json.loads(content)
            else:
                assert restored.step == 10, (path.name, name)
                (line,) = restored.rejected
                assert "step_000000020 is not used: " in line and path.name in line
            path.write_bytes(content)
            tried += 1
    assert tried >= 20
    assert_same(restore(copy, template).state, make_state(20))


def test_a_foreign_file_or_link_in_a_checkpoint_is_not_trusted(copy, template, tmp_path):
    (newest(copy) / "arrays" / "more.pkl").write_bytes(b"\x80\x04N.")
    assert "'arrays/more.pkl' does not belong there" in restore(copy, template).rejected[0]
    (newest(copy) / "arrays" / "more.pkl").unlink()
    path = files_of(newest(copy) / "arrays")[0]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert "neither a file nor a folder" in restore(copy, template).rejected[0]


def test_without_any_intact_checkpoint_nothing_starts_over(copy, template):
    before = len(files_of(copy))
    for step in copy.iterdir():
        with files_of(step / "arrays")[0].open("ab") as file:
            file.write(b"x")
    for _ in range(2):  # and it stays so
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is intact") as error:
            restore(copy, template)
        assert "step_000000010" in str(error.value) and "step_000000020" in str(error.value)
        assert "\n" not in str(error.value)
    assert len(files_of(copy)) == before


def test_a_damaged_checkpoint_is_set_aside_not_deleted(copy, template):
    count = len(files_of(newest(copy)))
    damaged = files_of(newest(copy))[0]
    damaged.write_bytes(b"")
    checkpoints = Checkpoints(copy, config=CONFIG, keep=1)
    assert checkpoints.restore(template).step == 10
    checkpoints.save(15, template)
    checkpoints.save(20, template)
    assert checkpoints.steps() == [20]
    aside = copy / "step_000000020.damaged1"
    assert (aside / damaged.relative_to(newest(copy))).read_bytes() == b""
    assert len(files_of(aside)) == count
    checkpoints.remove()
    assert [path.name for path in copy.iterdir()] == [aside.name]


def rewrite_manifest(folder, **changes):
    content = json.loads((folder / manifest.NAME).read_text()) | changes
    (folder / manifest.NAME).write_text(json.dumps(content))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused_by_name(copy, template, version):
    rewrite_manifest(newest(copy), format=version)
    restored = restore(copy, template)
    assert restored.step == 10
    assert (
        f"it has format version {version!r}, this program reads version 1" in restored.rejected[0]
    )


@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", "{}", '{"format": 1}', "\0", "1e999999"])
def test_a_manifest_that_is_none_is_no_reason_to_crash(copy, template, content):
    (newest(copy) / manifest.NAME).write_text(content)
    restored = restore(copy, template)
    assert restored.step == 10 and "manifest.json" in restored.rejected[0]


NO_MAPPINGS = (None, "x", 1.5, True, [1], [["a", 1]])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (field, value)
            for field in ("config", "notes", "scores", "files")
            for value in NO_MAPPINGS
        ),
        *(("step", value) for value in (*NO_MAPPINGS, -1, {})),
        *(("scores", value) for value in ({"a": 1}, {"1": "x"}, {"1": None}, {"1": True})),
        *(("files", value) for value in ({"a": 1}, {"a": ["x"]})),
    ],
)
def test_a_manifest_with_a_value_of_another_type_is_damaged(copy, template, field, value):
    """Its digest is right: a program wrote it, but not this one."""
    record = dataclasses.replace(manifest.verify(newest(copy)), **{field: value})
    manifest.write(newest(copy), record)
    restored = restore(copy, template)
    assert restored.step == 10 and f"'manifest.json' has {field} " in restored.rejected[0]


def test_names_in_a_manifest_open_nothing(copy, template, tmp_path):
    """A manifest with a right digest and file names that lead out of the folder."""
    secret = tmp_path / "secret"
    secret.write_text("untouched")
    record = manifest.verify(newest(copy))
    for name in ("../../secret", str(secret)):
        files = {**record.files, name: "0" * 64}
        manifest.write(newest(copy), manifest.Manifest(20, CONFIG, {}, {}, files))
        assert f"{name!r} is missing" in restore(copy, template).rejected[0]
    assert secret.read_text() == "untouched"


def test_linked_folders_are_neither_read_nor_deleted(copy, template, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(newest(copy), outside)
    (copy / "step_000000030").symlink_to(outside)
    (copy / "step_000000040.unfinished").symlink_to(outside)
    checkpoints = Checkpoints(copy, config=CONFIG, keep=1)
    assert checkpoints.restore(template).step == 20
    checkpoints.save(25, template)
    checkpoints.remove()
    assert len(files_of(outside)) > 5
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(ValueError, match="must not be a symbolic link"):
        Checkpoints(tmp_path / "link")


def test_a_checkpoint_under_another_steps_name_is_refused(copy, template):
    newest(copy).rename(copy / "step_000000099")
    assert "it holds step 20" in restore(copy, template).rejected[0]


def test_another_configuration_is_refused_naming_what_differs(two_steps, template):
    other = {"method": "lpa", "settings": {"learning_rate": 0.2, "epochs": 2}}
    with pytest.raises(ValueError, match=r"other settings \(learning_rate: 0.1 there, 0.2 here\)"):
        restore(two_steps, template, other)


def test_a_configuration_of_tuples_and_a_step_of_jax_are_what_they_were(tmp_path, template):
    config, notes = {"milestones": (1, 2)}, {"seeds": (0, 1)}
    Checkpoints(tmp_path, config=config).save(jnp.int32(20), template, notes=notes)
    found = Checkpoints(tmp_path, config=config).restore(template)
    assert (found.step, found.notes) == (20, {"seeds": [0, 1]})
    with pytest.raises(ValueError, match=r"config must be what JSON can hold, got .*object"):
        Checkpoints(tmp_path, config={"model": object()})
    with pytest.raises(ValueError, match="notes must be a dictionary, got list"):
        Checkpoints(tmp_path).save(30, template, notes=[1])


def test_another_state_is_refused_naming_the_arrays(two_steps, template, monkeypatch):
    wide = template.replace(params=jax.tree.map(lambda p: jnp.zeros((7, 7)), template.params))
    with pytest.raises(ValueError, match=r"'state/params/.* is float32\[.*this state's is float32"):
        restore(two_steps, wide)
    with pytest.raises(ValueError, match=r"hidden1/dense/bias.*; .*logits/dense/kernel"):
        restore(two_steps, wide)  # all of a few, not the first alone
    monkeypatch.setattr(array_files, "_MOST_NAMED", 1)
    with pytest.raises(ValueError, match=r"hidden1/dense/bias[^;]*; and 3 more differ$"):
        restore(two_steps, wide)
    more = template.replace(model_state={**template.model_state, "new": jnp.ones(1)})
    with pytest.raises(ValueError, match="holds no 'state/model_state/new'"):
        restore(two_steps, more)
    with pytest.raises(ValueError, match=r"holds 'state/opt_state.*which this state has not"):
        restore(two_steps, template.replace(opt_state=()))


def test_the_newest_and_the_best_are_kept(tmp_path):
    state = {"w": jnp.zeros(1)}
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    scores = {1: 0.5, 2: 0.9, 3: float("nan"), 4: 0.9, 5: 0.1, 6: float("inf")}
    for step, score in scores.items():
        checkpoints.save(step, state)
        checkpoints.score(step, score)
    assert checkpoints.steps() == [2, 5, 6] and checkpoints.best() == 2
    again = Checkpoints(tmp_path / "c", keep=1)
    assert again.restore(state).step == 6
    assert again.best() == 2
    again.score(6, 0.95)
    again.save(7, state)
    assert again.steps() == [6, 7] and again.best() == 6


def test_the_only_intact_checkpoint_outlives_any_number_of_failed_saves(tmp_path):
    state = {"w": np.random.default_rng(0).normal(size=100_000)}
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(1, state)
    with small_files():
        for step in (2, 3):
            with pytest.raises(CheckpointError, match=f"cannot save step {step} .*File too large"):
                checkpoints.save(step, state)
    assert Checkpoints(tmp_path / "c").restore({"w": np.zeros(100_000)}).step == 1


class small_files:  # noqa: N801
    """Within it the kernel lets no file grow beyond 100 kB, as on a disk without room."""

    def __enter__(self):
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, self.limits[1]))

    def __exit__(self, *exception):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


def test_a_full_disk_is_one_clear_line_and_saving_goes_on_when_there_is_room(tmp_path):
    state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=100_000), jnp.float32)}
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state)
    with small_files(), pytest.raises(CheckpointError) as error:
        checkpoints.save(2, state)
    assert str(error.value) == (
        f"cannot save step 2 in {tmp_path / 'c'}: File too large (checkpoints there: step 1)"
    )
    assert checkpoints.steps() == [1]
    assert not list((tmp_path / "c").glob("*.unfinished"))
    checkpoints.save(2, state)
    assert Checkpoints(tmp_path / "c").restore(state).step == 2


def test_a_folder_that_cannot_be_written_to_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot save step 1 in .*: Not a directory"):
        Checkpoints(tmp_path / "file" / "c").save(1, {"w": jnp.zeros(1)})
    if os.geteuid() == 0:
        return  # root may write where others may not
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        Checkpoints(tmp_path / "locked" / "c").save(1, {"w": jnp.zeros(1)})


def test_a_save_or_deletion_that_was_cut_short_leaves_no_checkpoint_behind(copy, template):
    (copy / "step_000000030.unfinished" / "arrays").mkdir(parents=True)
    newest(copy).rename(copy / "step_000000020.unfinished")  # as a deletion does first
    checkpoints = Checkpoints(copy, config=CONFIG)
    restored = checkpoints.restore(template)
    assert restored.step == 10 and restored.rejected == ()
    checkpoints.save(20, template)
    assert sorted(path.name for path in copy.iterdir()) == ["step_000000010", "step_000000020"]


def test_a_checkpoint_that_is_there_is_not_written_over(copy, template):
    with pytest.raises(CheckpointError, match="step_000000020 is there, but was not restored"):
        Checkpoints(copy, config=CONFIG).save(20, template)
    assert restore(copy, template).step == 20


def test_only_the_writer_writes(tmp_path):
    reader = Checkpoints(tmp_path / "c", is_writer=False)
    reader.save(1, {"w": jnp.zeros(1)})
    reader.score(1, 0.5)
    reader.remove()
    assert not (tmp_path / "c").exists()


def test_at_least_one_checkpoint_is_kept():
    with pytest.raises(ValueError, match="keep must be a whole number >= 1, got 0"):
        Checkpoints("anywhere", keep=0)


@pytest.mark.parametrize("schedule", [checkpoint.every_steps, checkpoint.every_seconds])
def test_a_schedule_needs_a_positive_interval(schedule):
    with pytest.raises(ValueError, match="got 0"):
        schedule(0)


def test_nothing_is_logged_of_a_save_and_a_restore(tmp_path):
    script = f"""
import absl.logging, jax.numpy as jnp
from lpa_jax.checkpoints.checkpoints import Checkpoints
absl.logging.use_absl_handler()
absl.logging.set_verbosity(absl.logging.INFO)
Checkpoints({str(tmp_path / "c")!r}).save(1, {{"w": jnp.ones(2)}})
Checkpoints({str(tmp_path / "c")!r}).restore({{"w": jnp.ones(2)}})
absl.logging.info("logged")
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0 and ran.stdout == ""
    lines = [line for line in ran.stderr.splitlines() if "before flag parsing" not in line]
    assert len(lines) == 1 and lines[0].endswith("] logged"), ran.stderr
