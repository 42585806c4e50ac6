"""Many classes: the benchmark's table, its refusals, and tables that outgrow memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lpa_jax
from experiments import many_classes
from experiments.compiled import step_cost
from lpa_jax.models import MLP
from lpa_jax.perturbations import Site
from tests.helpers.module_call import printed_rows, run_main

ACTIVATION = jax.ShapeDtypeStruct((4, 8, 8, 64), jnp.bfloat16)
TINY = ("--model=small_cnn", "--layer=stage1", "--image_size=8", "--batch_size=4", "--rounds=1")


@pytest.fixture
def run(capsys):
    """(*flags) -> (exit message or None, standard output)."""

    def call(*arguments):
        message = run_main(many_classes, *arguments)
        return message, capsys.readouterr().out

    return call


def test_a_run_prints_a_row_for_each_combination_and_why_one_is_missing(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    message, out = run(
        *TINY, "--classes=50", "--modes=carry", "--memory_limit=0.02", "--shapes=full,channel"
    )
    assert message is None
    names, full, channel = printed_rows(out)
    assert full == ["50", "carry", "full", *["-"] * 7]
    measured = dict(zip(names, channel, strict=True))
    assert (measured["classes"], measured["shape"]) == ("50", "channel")
    # 50 classes x 16 channels x 4 bytes.
    assert float(measured["table MB"]) == 50 * 16 * 4 / 1e6
    assert float(measured["ratio"]) > 0 and float(measured["memory MB"]) > 0
    assert out.splitlines()[-1].startswith("50 carry full: lpa with mode='carry'")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--classes=10,x"], "--classes must be whole numbers in 2..1000000, got '10,x'"),
        (["--classes=1"], "--classes must be whole numbers in 2..1000000, got '1'"),
        (["--modes=warm"], "--modes must be one of cold, carry, free, got 'warm'"),
        (["--shapes="], "--shapes must be one of full, channel, got ''"),
        (["--layer=nowhere"], "unknown layer 'nowhere'"),
        (["--rounds=0"], "--rounds=0"),
    ],
)
def test_bad_flags_get_one_line_that_names_them(run, arguments, expected):
    message, _ = run(*TINY, *arguments)
    assert message is not None and expected in message and "\n" not in message


@pytest.mark.parametrize("mode", ["carry", "free"])
def test_table_that_outgrows_the_limit_is_refused_and_channel_shape_is_named(mode):
    options = {"mode": mode, "assignment": lpa_jax.all_positive()}
    with pytest.raises(ValueError, match="keeps a table") as refusal:
        lpa_jax.lpa(0.1, memory_limit=100_000_000, **options).init(ACTIVATION, 8142)
    assert str(refusal.value) == (
        f"lpa with mode={mode!r}, shape='full' keeps a table of 8142 classes x (8, 8, 64), "
        "133.4 MB, more than memory_limit=100 MB; shape='channel' keeps 2.084 MB, mode='cold' "
        "keeps none"
    )
    table = lpa_jax.lpa(0.1, memory_limit=2_100_000, shape="channel", **options)
    assert table.init(ACTIVATION, 8142)["delta"].nbytes == 8142 * 64 * 4


def test_limit_is_the_last_size_that_fits_and_none_is_no_limit():
    options = {"mode": "carry", "assignment": lpa_jax.all_positive()}
    flat = jax.ShapeDtypeStruct((4, 16), jnp.float32)
    assert lpa_jax.lpa(0.1, memory_limit=640, **options).init(flat, 10)["delta"].nbytes == 640
    # One value a channel already: no smaller shape to name.
    with pytest.raises(ValueError, match=r"memory_limit=0.000639 MB; mode='cold' keeps none$"):
        lpa_jax.lpa(0.1, memory_limit=639, **options).init(flat, 10)
    lpa_jax.lpa(0.1, memory_limit=None, **options).init(flat, 10)
    cold = lpa_jax.lpa(0.1, memory_limit=0, assignment=lpa_jax.all_positive())
    assert cold.init(flat, 10) == {}
    with pytest.raises(ValueError, match="memory_limit must be finite and >= 0, got -1"):
        lpa_jax.lpa(0.1, memory_limit=-1, **options)


def test_cold_refuses_a_table_of_gradients_that_outgrows_the_limit_once_the_batch_is_known():
    """Its rows are those of min(C, global batch) classes, here 4."""
    activation = jnp.zeros(ACTIVATION.shape, ACTIVATION.dtype)
    num_classes = 8142
    site = Site(
        activation=activation,
        targets=jnp.zeros((4, num_classes)),
        labels=jnp.arange(4),
        decode=lambda h: jnp.zeros((4, num_classes)) + jnp.mean(h),
        loss=lpa_jax.losses.cross_entropy,
        rng=jax.random.key(0),
    )

    def apply(limit, **options):
        rule = lpa_jax.all_positive()
        perturbation = lpa_jax.lpa(0.1, memory_limit=limit, assignment=rule, **options)
        return jax.eval_shape(lambda: perturbation.apply({}, site).activation)

    with pytest.raises(ValueError, match="sums gradients") as refusal:
        apply(4 * 8 * 8 * 64 * 4 - 1)
    assert str(refusal.value) == (
        "lpa with mode='cold', shape='full' sums gradients in a table of 4 classes x (8, 8, 64), "
        "0.06554 MB, more than memory_limit=0.06553 MB; shape='channel' sums gradients in "
        "0.001024 MB, fewer than 4 examples make fewer rows"
    )
    for limit, shape in ((4 * 8 * 8 * 64 * 4, "full"), (4 * 64 * 4, "channel"), (None, "full")):
        assert apply(limit, shape=shape).shape == ACTIVATION.shape


@pytest.mark.parametrize("mode", ["cold", "free", pytest.param("carry", marks=pytest.mark.slow)])
def test_a_step_pays_for_absent_classes_with_their_rows_and_their_logits_alone(mode):
    examples, features = 8, 8

    def above_erm(num_classes):
        """Bytes and FLOPs."""
        rule = lpa_jax.by_frequency([1] * num_classes)
        plan = {"hidden1": lpa_jax.lpa(0.1, 1, mode=mode, assignment=rule)}
        network = MLP(num_classes, hidden=(512, features))
        state, batch = step_cost.make_state(network, examples, 4, 1)
        erm, _ = step_cost.compile_step(state, batch, {})
        own_state = step_cost.with_perturbations(state, batch, plan)
        step, _ = step_cost.compile_step(own_state, batch, plan)
        memory = 1e6 * (step_cost.memory_mb(step) - step_cost.memory_mb(erm))
        return np.array([memory, step_cost.flops(step) - step_cost.flops(erm)])

    memory, flops = above_erm(2100) - above_erm(100)
    rows = 2000 * 512 * 4 if mode != "cold" else 0
    # Beyond the rows: some vectors of C numbers (signs, radii, counts, logits of 8 examples).
    assert abs(memory - rows) < 2000 * 4 * 64
    # A pass of PGD multiplies by the head forward and backward; the rest is loss and vectors.
    head = 2 * 2 * examples * features if mode != "free" else 0
    assert flops < 2000 * (head + 20 * examples)
