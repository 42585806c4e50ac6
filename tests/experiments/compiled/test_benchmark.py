"""The timing benchmark: what it prints, the FLOP floor against hand counts, what it refuses."""

import csv
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
from absl import flags

import lpa_jax
from experiments import benchmark
from experiments.compiled import against_torch, step_cost, timing
from tests.helpers.module_call import printed_rows, run_main

FLAGS = flags.FLAGS
TINY = ("--model=mlp", "--image_size=4", "--channels=1", "--batch_size=8", "--num_classes=3",
        "--layers=hidden2", "--rounds=2", "--steps=2")  # fmt: skip


@pytest.fixture
def run(capsys):
    """(*flags) -> (exit message or None, standard output, standard error)."""

    def call(*arguments):
        message = run_main(benchmark, *arguments)
        captured = capsys.readouterr()
        return message, captured.out, captured.err

    return call


def test_a_run_prints_one_parsable_row_a_case_and_writes_the_same_numbers(
    run, tmp_path, monkeypatch
):
    path = tmp_path / "new" / "table.csv"
    monkeypatch.setenv("COLUMNS", "200")
    message, out, err = run(*TINY, "--methods=erm,lpa,lpa:free", f"--csv={path}")
    assert message is None
    assert "[3/3] lpa:free hidden2 0:" in err and "batch 8, images 4x4x1" in out
    header, *printed = printed_rows(out)
    assert header[:3] == ["method", "layer", "steps"]
    assert [tuple(cells[:3]) for cells in printed] == [
        ("erm", "-", "0"),
        ("lpa", "hidden2", "2"),
        ("lpa:free", "hidden2", "0"),
    ]
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for cells, row in zip(printed, rows, strict=True):
        number = {name: float(row[name]) for name in row if name not in ("method", "layer")}
        assert 0 < number["erm_min"] <= number["erm_ms"] <= number["erm_max"]
        assert 0 < number["step_min"] <= number["step_ms"] <= number["step_max"]
        assert number["ratio_to_floor"] == pytest.approx(number["ratio"] / number["floor"])
        assert number["compile_s"] > 0 and number["memory_mb"] > 0
        assert [float(cells[i]) for i in (7, 8, 10)] == pytest.approx(
            [number["ratio"], number["floor"], number["flops"]], abs=6e-4
        )
        assert cells[4] == f"[{number['erm_min']:.2f}..{number['erm_max']:.2f}]"
    floors = [float(row["floor"]) for row in rows]
    assert floors[0] == floors[2] == float(rows[0]["flops"]) == 1.0 and floors[1] > 1.01


BATCH, SIDE, WIDTHS = 256, 4, (64, 96, 32)


def bias_free_mlp():
    """x W1 -> relu -> W2 -> relu -> W3, cut behind W1; its matmuls are all that costs."""
    sizes = (SIDE * SIDE, *WIDTHS)

    def init(rng, images):
        del images
        keys = jax.random.split(rng, len(WIDTHS))
        shapes = zip(keys, sizes, WIDTHS, strict=False)
        return [jax.random.normal(key, (a, b)) / np.sqrt(a) for key, a, b in shapes]

    def decode(params, h):
        return jax.nn.relu(jax.nn.relu(h) @ params[1]) @ params[2]

    return lpa_jax.CutFunctions(
        lambda params, images: images.reshape(images.shape[0], -1) @ params[0],
        decode,
        init_params=init,
    )


@pytest.mark.parametrize(
    ("layer", "first_above", "steps", "examples"),
    [("hidden", 1, 3, 1), ("hidden", 1, 3, 0.25), ("input", 0, 1, 1)],
)
def test_the_floor_is_that_of_the_matmuls_and_the_compiled_step_reaches_it(
    layer, first_above, steps, examples
):
    labels = jnp.arange(BATCH) % WIDTHS[-1]
    batch = {"image": jnp.ones((BATCH, SIDE, SIDE, 1)), "label": labels}
    state = lpa_jax.TrainState.create(bias_free_mlp(), optax.sgd(0.1), jax.random.key(0), batch)
    matmuls = 2 * BATCH * np.multiply((SIDE * SIDE, *WIDTHS[:-1]), WIDTHS)
    # Forward, weight gradient, and the gradient of every input but the images.
    plain = np.sum(matmuls) * 3 - matmuls[0]
    above = np.sum(matmuls[first_above:])

    erm, _ = step_cost.compile_step(state, batch, {})
    gradient_pass = step_cost.lower_gradient_pass(state, batch, layer).compile()
    assert step_cost.flops(erm) == pytest.approx(plain, rel=0.05)
    assert step_cost.flops(gradient_pass) == pytest.approx(2 * above, rel=0.05)

    passes = steps * examples
    floor = step_cost.floor_ratio(step_cost.flops(erm), step_cost.flops(gradient_pass), passes)
    assert floor == pytest.approx(1 + passes * 2 * above / plain, rel=0.02)
    rule = lpa_jax.all_positive()
    perturbations = {layer: lpa_jax.lpa(0.1, steps, assignment=rule, examples=examples)}
    own_state = step_cost.with_perturbations(state, batch, perturbations)
    step, _ = step_cost.compile_step(own_state, batch, perturbations)
    assert step_cost.flops(step) / step_cost.flops(erm) == pytest.approx(floor, rel=0.05)


def test_steps_alternate_in_order_and_leave_the_states_of_the_caller_unchanged():
    calls = []

    def step_of(name):
        @jax.jit
        def count(state):
            return state + 1

        def step(state, batch):
            calls.append((name, int(state)))
            assert batch == "batch"
            return count(state), {}

        return step

    state = jnp.zeros((), jnp.int32)
    times = timing.time_steps((step_of("a"), state), (step_of("b"), state), "batch", rounds=3)
    assert len(times.first) == len(times.second) == 3 and min(times.first + times.second) > 0
    assert [name for name, _ in calls] == list("abbaabbaab")
    assert [count for name, count in calls if name == "b"] == [0, 1, 2, 3, 4]
    assert int(state) == 0


def test_each_number_belongs_to_its_measurement_whichever_came_first():
    numbers = iter(range(1, 9))
    first, second = (lambda: next(numbers)), (lambda: -next(numbers))
    times = timing.in_turn(first, second, rounds=3, warm_up=1)
    assert times == ((4, 5, 8), (-3, -6, -7))
    assert times.ratio == -7 / 8


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--methods=ermm"], "--methods must be one of erm, adversarial, dropout, "),
        (["--methods=dropout:free"], "one of cold, carry, free, got 'dropout:free'"),
        (
            ["--methods=lpa:warm"],
            "--methods: MODE in lpa:MODE must be one of cold, carry, free, got 'lpa:warm'",
        ),
        (["--methods="], "--methods must name at least one method"),
        (["--examples=0"], "--examples must be in (0, 1], got 0.0"),
        (["--examples=0.5", "--against=torch"], "--examples must be 1 with --against, got 0.5"),
        (["--methods=mixstyle"], "mixstyle at hidden2: mixstyle needs an activation"),
        (["--layers=stage1"], "unknown layer 'stage1'; the injection points are: input, hidden1"),
        (["--steps=1,x"], "--steps must be whole numbers in 1..1000, got '1,x'"),
        (["--steps=0"], "--steps must be whole numbers in 1..1000, got '0'"),
        (["--csv=tests"], "--csv must name a file that can be written, got 'tests'"),
        (["--rounds=0"], "--rounds=0"),
        (
            ["--model=vit", "--layers=pool", "--image_size=20"],
            "patch must divide the image size",
        ),
        (["--dtype=int8"], "--dtype=int8"),
        (["--folder=tests"], "--folder needs --against=torch"),
    ],
)
def test_bad_input_gets_one_line_that_names_it_and_nothing_is_written(
    run, tmp_path, monkeypatch, arguments, expected
):
    path = tmp_path / "table.csv"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    before = sorted(tmp_path.rglob("*"))
    message, _, _ = run(*TINY, f"--csv={path}", *arguments)
    assert message is not None and expected in message and "\n" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_without_pytorch_the_command_that_installs_it_is_named(run, monkeypatch):
    monkeypatch.setattr(against_torch, "torch", None)
    message, out, _ = run(*TINY, "--against=torch")
    expected = "error: --against=torch needs PyTorch, which is not installed: pip install torch"
    assert message == expected and not out


@pytest.mark.parametrize("network", [(), ("--model=small_cnn", "--layers=stage2")])
def test_pytorch_takes_the_same_steps(run, network):
    pytest.importorskip("torch")
    message, out, _ = run(*TINY, *network, "--against=torch", "--methods=erm,lpa")
    assert message is None
    assert [cells[0] for cells in printed_rows(out)[-2:]] == ["erm", "lpa"]


def test_a_folder_is_read_by_both(run, tmp_path):
    pytest.importorskip("torchvision")
    for name in ("a/1", "a/2", "b/1"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (6, 5), (len(name), 2, 3)).save(path)
    message, out, _ = run(*TINY, "--against=torch", f"--folder={tmp_path}", "--batch_size=2")
    assert message is None
    assert printed_rows(out)[-1][0] == "read"


@pytest.mark.parametrize(("cores", "expected"), [({0}, "CPU time"), ({0, 1}, "wall time")])
def test_on_one_core_cpu_time_is_measured(monkeypatch, cores, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: cores, raising=False)
    assert timing.clock()[0] == expected
    elapsed = timing.milliseconds(lambda: time.sleep(0.05))()
    assert (elapsed < 40) == (expected == "CPU time")
