"""Compiling for absent TPUs: reading HLO, promises and what breaks them, a small pod for real."""

import collections
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json

import jax
import pytest
from absl import flags

from experiments import compile_check
from experiments.compiled import hlo, promises, step_cost, store, tpu
from lpa_jax.perturbations import Site
from tests.helpers.commands import parsed
from tests.helpers.module_call import run_main

FLAGS = flags.FLAGS
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for TPUs, is not installed: pip install '.[tpu-check]'",
)

TEXT = """\
HloModule jit__fun, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[4,3]{1,0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%fused_forward (h: f32[8,4], w: f32[4,3]) -> f32[8,3] {
  %h = f32[8,4]{1,0:T(8,128)} parameter(0)
  %w = f32[4,3]{1,0:T(8,128)} parameter(1)
  ROOT %conv.1 = f32[8,3]{1,0:T(8,128)S(1)} convolution(%h, %w), dim_labels=bf_io->bf, metadata={op_name="jit(_fun)/jvp(jvp(Net))/logits/dense/dot_general" stack_frame_id=3}
}

%gathering (l: s32[2]) -> s32[8] {
  %l = s32[2]{0} parameter(0)
  ROOT %gathered = s32[8]{0} all-gather(%l), dimensions={0}
}

%body (t: (f32[8,4])) -> (f32[8,4]) {
  %t = (f32[8,4]{1,0}) parameter(0)
  ROOT %looped = (f32[8,4]{1,0}) fusion(%t), kind=kLoop, calls=%add
}

ENTRY %main (p: f32[8,4], q: f32[4,3], l: s32[2]) -> f32[4,3] {
  %p = f32[8,4]{1,0:T(8,128)} parameter(0)
  %q = f32[4,3]{1,0:T(8,128)} parameter(1)
  %l = s32[2]{0} parameter(2)
  %first = f32[8,3]{1,0:T(8,128)} fusion(%p, %q), kind=kOutput, calls=%fused_forward
  %again = f32[8,3]{1,0:T(8,128)} fusion(%p, %q), kind=kOutput, calls=%fused_forward
  %image = bf16[2,8,8,4]{0,3,2,1:T(8,128)(2,1)} convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01oi->b01f, metadata={op_name="jit(_fun)/transpose(jvp(Net))/stage1/conv"}
  %kernel = f32[3,3,4,4]{3,2,1,0} convolution(%c, %d), window={size=8x8 pad=1_1x1_1}, dim_labels=f01b_i01o->01bf, metadata={op_name="jit(_fun)/transpose(jvp(Net))/stage1/conv"}
  %weights = f32[4,3]{1,0} dot(%p, %first), lhs_contracting_dims={0}, rhs_contracting_dims={0}, metadata={op_name="jit(_fun)/transpose(jvp(Net))/logits/dense/dot_general"}
  %sums = (f32[10,64]{1,0:T(8,128)S(1)}, pred[3]{0}, /*index=2*/f32[]{:T(128)}, bf16[5]{0}) all-reduce(%s, %t, %u, %v), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %start = (f32[6]{0}, f32[6]{0}) all-reduce-start(%z), to_apply=%add
  %done = f32[6]{0} all-reduce-done(%start)
  %async = ((s32[2]{0}), s32[8]{0}) async-start(%l), calls=%gathering
  %finished = s32[8]{0} async-done(%async), calls=%gathering
  %link = s32[1,8]{1,0} all-gather(%l), channel_id=2, frontend_attributes={chain_id="0"}
  %next = s32[1,8]{1,0} all-gather(%l), channel_id=2, frontend_attributes={chain_id="0"}
  %other = s32[1,6]{1,0} all-gather(%l), channel_id=2, frontend_attributes={chain_id="1"}
  %loop = (f32[8,4]{1,0}) while(%p), condition=%add, body=%body
  ROOT %result = f32[4,3]{1,0} copy(%weights)
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def instructions():
    return hlo.executed(TEXT)


def test_collectives_count_once_with_the_bytes_of_their_results(instructions):
    found = hlo.collectives(instructions)
    assert [exchange.kind for exchange in found] == ["all-reduce"] * 2 + ["all-gather"] * 3
    assert [str(array) for array in found[0].arrays] == [
        "f32[10,64]",
        "pred[3]",
        "f32[]",
        "bf16[5]",
    ]
    assert [exchange.bytes for exchange in found] == [
        4 * 640 + 3 + 4 + 2 * 5,
        4 * 6,
        4 * 8,
        4 * 8,
        4 * 6,
    ]


def test_contractions_have_their_layer_and_part_and_fusions_count_a_call_each(instructions):
    assert hlo.tally(hlo.contractions(instructions), ("stage1", "logits")) == {
        ("logits", hlo.FORWARD, "f32[8,3]"): 2,
        ("stage1", hlo.INPUT_GRADIENT, "bf16[2,8,8,4]"): 1,
        ("stage1", hlo.WEIGHT_GRADIENT, "f32[3,3,4,4]"): 1,
        ("logits", hlo.WEIGHT_GRADIENT, "f32[4,3]"): 1,
    }


def test_loops_and_what_they_call_are_walked_once(instructions):
    names = collections.Counter(instruction.name for instruction in instructions)
    # Called as two reducers, by the fusion in the loop's body, and as the loop's condition.
    assert names["looped"] == 1 and names["sum"] == 4 and names["gathered"] == 1


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.executed("HloModule empty")


SETTING = tpu.Setting(
    "v5e:2x2", "mlp", "float32", num_classes=10, batch_size=64, image_size=4, channels=1
)
COLD = promises.Method("hidden2", "cold", 2, "full", "signed", "frequency")
LAYERS = ("input", "hidden1", "hidden2", "hidden3", "logits")


def arrays(*texts):
    return tuple(hlo.Array.parse(text) for text in texts)


@pytest.mark.parametrize(
    ("changes", "classes", "batch", "expected"),
    [
        ({}, 10, 64, ["f32[10,6]"] * 3 + ["f32[10]", "f32[]"]),
        ({"steps": 5, "geometry": "free"}, 10, 64, ["f32[10,6]"] * 5 + ["f32[10]", "f32[]"]),
        ({"mode": "carry", "steps": 1}, 10, 64, ["f32[10,6]"] * 2 + ["f32[10]", "f32[]"]),
        ({"mode": "free", "steps": 1}, 10, 64, ["f32[10,6]"] * 2 + ["f32[10]", "f32[]"]),
        ({"assignment": "confidence"}, 3, 4, ["f32[3,6]"] * 3 + ["f32[3]", "f32[]", "f32[3]"]),
        # More classes than examples: tables have a slot an example.
        ({}, 1000, 64, ["f32[64,6]"] * 3 + ["f32[1000]", "f32[]"]),
    ],
)
def test_a_step_exchanges_one_class_table_a_pass_and_one_of_means(
    changes, classes, batch, expected
):
    setting = dataclasses.replace(SETTING, num_classes=classes, batch_size=batch)
    method = dataclasses.replace(COLD, **changes)
    assert promises.class_exchange(setting, method, (6,)) == list(arrays(*expected))


def kept():
    """Programs as the promises want them: two gradient passes above hidden2."""
    memory = {"arguments": 9, "results": 8, "aliased": 8, "temporaries": 2, "code": 1}
    gradients = hlo.Collective("all-reduce", arrays("f32[16,6]", "f32[6,10]"))
    erm = collections.Counter(
        {
            ("hidden1", hlo.FORWARD, "f32[16,6]"): 1,
            ("hidden1", hlo.WEIGHT_GRADIENT, "f32[16,6]"): 1,
            ("logits", hlo.FORWARD, "f32[16,10]"): 1,
            ("logits", hlo.INPUT_GRADIENT, "f32[16,6]"): 1,
            ("logits", hlo.WEIGHT_GRADIENT, "f32[6,10]"): 1,
        }
    )
    decode = collections.Counter(
        {("logits", hlo.FORWARD, "f32[16,10]"): 1, ("logits", hlo.INPUT_GRADIENT, "f32[16,6]"): 1}
    )
    tables = [
        # The compiler may flatten a table.
        hlo.Collective("all-reduce", arrays("f32[10,6]", "f32[60]", "f32[10]", "f32[]")),
        hlo.Collective("all-reduce", arrays("f32[10,6]")),
    ]
    return promises.Result(
        SETTING,
        COLD,
        LAYERS,
        row=(6,),
        memory=12,
        erm=tpu.Program(10.0, 5.0, memory, [gradients], erm),
        gradient_pass=tpu.Program(2.0, 1.0, memory, [], decode),
        program=tpu.Program(14.0, 6.0, memory, [*tables, gradients], erm + decode + decode),
    )


def test_promises_that_are_kept_pass_and_the_floor_is_that_of_the_passes():
    outcome = promises.checks(kept())
    assert [check.passed for check in outcome] == [True] * 6
    assert kept().floor == 1.4
    assert outcome[1].seen == "0.00 of 0.00 GiB" and outcome[4].seen.startswith("6 convolutions")


def more(layer, role, result):
    def change(program):
        extra = collections.Counter({(layer, role, result): 1})
        return dataclasses.replace(program, contractions=program.contractions + extra)

    return change


@pytest.mark.parametrize(
    ("claim", "change", "seen"),
    [
        ("PGD forms no parameter gradients", more("logits", hlo.WEIGHT_GRADIENT, "f32[6,10]"),
         "3 weight gradients, 2 expected; beyond: 1 x logits weight gradient f32[6,10]"),
        ("encode is not recomputed", more("hidden1", hlo.FORWARD, "f32[16,6]"),
         "beyond: 1 x hidden1 forward f32[16,6]"),
        ("decode runs for PGD as often as its steps need it (2)",
         more("logits", hlo.FORWARD, "f32[16,10]"), "beyond: 1 x logits forward f32[16,10]"),
        (
            "beyond ERM, devices exchange the class table and nothing else",
            lambda p: dataclasses.replace(
                p, collectives=[*p.collectives[1:], hlo.Collective("all-gather", arrays("f32[7]"))]
            ),
            "7 expected; beyond: 1 x f32[7]; missing: 1 x f32[10], 1 x f32[1], 2 x f32[60]",
        ),
        ("the method fits the memory of a device",
         lambda p: dataclasses.replace(p, memory={**p.memory, "temporaries": 3}),
         "0.00 of 0.00 GiB"),
    ],
)  # fmt: skip
def test_a_broken_promise_fails_its_own_check_and_says_what_was_seen(claim, change, seen):
    result = kept()
    result = result._replace(program=change(result.program))
    broken = [check for check in promises.checks(result) if not check.passed]
    assert [check.claim for check in broken] == [claim] and seen in broken[0].seen


def test_a_program_that_the_compiler_refused_is_reported_and_nothing_else_is_claimed():
    result = kept()
    result = result._replace(program=tpu.Program(refused="RESOURCE_EXHAUSTED: 32G of 15.75G"))
    outcome = promises.checks(result)
    assert [check.passed for check in outcome] == [True, False]
    assert outcome[1].seen == "RESOURCE_EXHAUSTED: 32G of 15.75G"


def test_a_program_survives_json():
    program = kept().program
    assert tpu.Program.from_dict(json.loads(json.dumps(program.as_dict()))) == program


@pytest.fixture
def run(capsys):
    """(*flags) -> (exit message or None, standard output)."""
    cache = jax.config.jax_enable_compilation_cache

    def call(*arguments):
        message = run_main(compile_check, *arguments)
        jax.config.update("jax_enable_compilation_cache", cache)
        return message, capsys.readouterr().out

    return call


TINY = ("--topology=v5e:2x2", "--model=mlp", "--layer=hidden2", "--batch_size=64",
        "--image_size=4", "--channels=1", "--num_classes=10")  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--layer=stage9"], "unknown layer 'stage9'; the injection points are: input, hidden1"),
        (["--model=mlpp"], "--model must be one of mlp, small_cnn"),
        (["--dtype=int8"], "--dtype must be one of float32, bfloat16, got 'int8'"),
        (["--mode=warm"], "--mode must be one of cold, carry, free, got 'warm'"),
        (["--steps=0"], "--steps must be whole numbers in 1..1000, got '0'"),
        (["--num_classes=ten"], "--num_classes must be whole numbers in 2..1000000, got 'ten'"),
        (["--shape="], "--shape must be one of full, channel, got ''"),
        (["--batch_size=0"], "--batch_size=0"),
        pytest.param(["--topology=v5e:3x5"], "--topology must be a TPU slice such as",
                     marks=needs_libtpu),
        pytest.param(["--topology=h100:8"], "--topology must be a TPU slice such as",
                     marks=needs_libtpu),
        pytest.param(["--batch_size=66"],
                     "--batch_size must be a multiple of the 4 devices of v5e:2x2, got 66",
                     marks=needs_libtpu),
        pytest.param(["--output=."], "--output must name a file that can be written",
                     marks=needs_libtpu),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_that_names_the_flag(run, arguments, expected):
    message, out = run(*TINY, *arguments)
    assert message is not None and expected in message and "\n" not in message
    assert out == ""


def test_without_libtpu_the_extra_is_named(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tpu.topology.cache_clear()
    message, _ = run(*TINY)
    assert message == (
        "error: --topology needs libtpu, which is not installed: pip install 'lpa_jax[tpu-check]'"
    )


@needs_libtpu
def test_a_small_pod_keeps_every_promise_and_a_second_run_compiles_nothing(
    run, tmp_path, monkeypatch
):
    path = tmp_path / "programs.json"
    # Mode cold sums classes in slots, since there are more than examples.
    arguments = (*TINY, f"--output={path}", "--steps=2", "--num_classes=10,100")
    message, out = run(*arguments)
    assert message is None
    assert out.count("pass  ") == 12 and "FAIL" not in out
    assert "method: all-reduce" in out and "s32[64]" not in out
    kept = json.loads(path.read_text(encoding="utf-8"))["compiled_programs"]
    assert len(kept) == 6
    erm, gradient_pass, method, *_ = map(tpu.Program.from_dict, kept.values())
    # The forward pass, the gradient of every product's input but the images', of every weight.
    sizes = (16, 256, 256, 128, 10)
    products = [2 * 16 * a * b for a, b in itertools.pairwise(sizes)]
    parameters = sum((a + 1) * b for a, b in itertools.pairwise(sizes))
    # Momentum, rate and norm take some operations for every parameter.
    assert 0 < erm.flops - (3 * sum(products) - products[0]) < 10 * parameters
    assert gradient_pass.flops == pytest.approx(2 * sum(products[2:]), rel=0.05)
    assert method.flops == pytest.approx(erm.flops + 2 * gradient_pass.flops, rel=0.05)
    assert method.exchanged_bytes == erm.exchanged_bytes + 4 * (3 * 10 * 256 + 10 + 1)

    # Neither compiles: the second run finds the programs in the file.
    monkeypatch.setattr(tpu.Lowered, "compile", None)
    assert run(*arguments) == (None, out)
    message, table = run(*arguments, "--markdown", "--nocompile", "--mode=cold,carry")
    assert message is None, "a case that is not in the file is left out"
    assert [line.split(" | ")[-1] for line in table.splitlines()[2:]] == ["6/6 |"] * 2

    # Another step is another program, which the file does not hold.
    monkeypatch.setattr(step_cost, "RADIUS", 0.06)
    _, table = run(*arguments, "--markdown", "--nocompile")
    assert len(table.splitlines()) == 2


@needs_libtpu
def test_a_state_spread_over_a_pod_takes_less_memory_of_each_device(run, tmp_path):
    arguments = {}
    for placement in ("mesh", "fsdp"):
        path = tmp_path / f"{placement}.json"
        message, out = run(*TINY, "--steps=1", f"--placement={placement}", f"--output={path}")
        assert message is None and out.count("pass  ") == 2
        kept = json.loads(path.read_text(encoding="utf-8"))["compiled_programs"]
        arguments[placement] = [program["memory"]["arguments"] for program in kept.values()]
    for whole, spread in zip(arguments["mesh"][::2], arguments["fsdp"][::2], strict=True):
        assert spread < 0.4 * whole


@needs_libtpu
def test_a_step_that_exchanges_more_is_noticed(run, monkeypatch):
    def gathered_mean(site, values):
        return jax.numpy.mean(jax.lax.all_gather(values, site.axis_name, tiled=True))

    monkeypatch.setattr(Site, "global_mean", gathered_mean)
    message, out = run(*TINY, "--mode=free")
    assert message == "1 checks failed"
    failed = next(line for line in out.splitlines() if line.startswith("FAIL"))
    assert "beyond ERM, devices exchange" in failed and "beyond: 1 x f32[64]" in failed


class Lowered:
    """Stands for a program whose lowered text is `text`; counts how often it is compiled."""

    compiled = 0

    def __init__(self, text, target="v5e:2x2"):
        self.text, self.target = text, target

    def compile(self):
        Lowered.compiled += 1
        return kept().erm


@pytest.fixture
def get(tmp_path, monkeypatch):
    """(lowered, **options of Programs) -> what a new process gets, and how often one compiled."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(Lowered, "compiled", 0)

    def get_in_new_process(lowered, **options):
        programs = store.Programs(str(tmp_path / "programs.json"), **options)
        return programs.get("name", lambda: lowered), Lowered.compiled

    return get_in_new_process


def test_a_program_is_compiled_once_and_again_only_if_what_decides_it_changed(get, monkeypatch):
    program = kept().erm
    assert get(Lowered("one")) == (program, 1)
    assert get(Lowered("one")) == (program, 1), "read from the file"
    assert get(Lowered("two")) == (program, 2), "another text"
    assert get(Lowered("one", "v6e:2x2")) == (program, 3), "other devices"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_other=true")
    assert get(Lowered("one")) == (program, 4), "another flag of the compiler"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0")
    assert get(Lowered("one")) == (program, 5), "another version of it"
    monkeypatch.setattr(hlo, "__file__", __file__)
    assert get(Lowered("one")) == (program, 6), "another reader of its text"
    assert get(Lowered("three"), compile_missing=False) == (None, 6)


def test_a_program_of_the_same_name_is_lowered_once_a_process(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    programs, lowered = store.Programs(None), []
    for _ in range(2):
        assert programs.get("name", lambda: lowered.append(1) or Lowered("text")) == kept().erm
    assert lowered == [1]


def test_a_file_of_something_else_is_refused(get, tmp_path):
    path = tmp_path / "programs.json"
    get(Lowered("one"))
    old = '{"versions": {"jax": "0.10.2"}, "programs": {}}'
    damaged = '{"compiled_programs": {"key": {"flops": 1.0}}}'
    for text in ("[]", old, damaged, path.read_text(encoding="utf-8")[:-20]):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"--output must name a file of compile_check, got '"):
            store.Programs(str(path))


def test_the_star_has_each_level_of_the_grid_once_around_the_base_case():
    with parsed(compile_check, []):
        cases = compile_check.make_star({**compile_check.GRID, "layer": ["stage2"]})
    assert len(cases) == len(set(cases)) == 22
    rays = [f"{s.topology} {s.dtype} {s.num_classes} {m}" for s, m in cases if s.model[0] == "r"]
    assert rays[:6] == [
        "v5e:16x16 float32 100 lpa:cold:3 at stage2, full",
        "v5e:16x16 float32 100 lpa:cold:3 at stage2, channel",
        "v5e:16x16 float32 100 lpa:carry at stage2, full",
        "v5e:16x16 float32 100 lpa:free at stage2, full",
        "v5e:4x4 float32 100 lpa:cold:3 at stage2, full",
        "v5e:16x16 bfloat16 100 lpa:cold:3 at stage2, full",
    ]
    assert [s.num_classes for s, _ in cases[-3:]] == [10, 1000, 8142]
    assert {m.steps for _, m in cases if m.mode == "cold"} == {1, 3, 5}


def test_the_star_of_flags_that_are_given_has_its_base_in_them():
    values = {**compile_check.GRID, "layer": ["stage2"], "model": ["mlp"], "mode": ["free"]}
    with parsed(compile_check, []):
        cases = compile_check.make_star({**values, "topology": ["v5e:2x2", "v5e:4x4"]})
    assert {s.topology for s, _ in cases} == {"v5e:2x2", "v5e:4x4"}
    assert {(s.model, m.mode, m.steps) for s, m in cases} == {("mlp", "free", 1)}
    assert cases[0][0].topology == "v5e:2x2" and len(cases) == 1 + 1 + 1 + 1 + 3
