"""A case of `compile_check` as text and as a row of a table."""

from collections import Counter
from collections.abc import Iterator, Sequence

from experiments.compiled import hlo, tpu
from experiments.compiled.promises import Check, Result


def text(result: Result, outcome: Sequence[Check]) -> str:
    """One case as text: costs of ERM and the method, collectives, checks."""
    setting, method = result.setting, result.method
    slice_ = tpu.topology(setting.topology)
    lines = [
        f"{method}, {method.geometry}, {method.assignment}",
        f"{setting.model}, {setting.dtype}, {setting.num_classes} classes, batch "
        f"{setting.batch_size}, {tpu.share(setting)} a device, {setting.placement}",
        f"{slice_.name}: {len(slice_.devices)} devices on {slice_.chips} chips, {slice_.kind}, "
        f"{slice_.memory / tpu.GIB:g} GiB a device",
    ]
    if not result.refused:
        lines += ["", *_side_by_side(result), ""]
        for name, program in (("ERM", result.erm), ("method", result.program)):
            lines += [f"{name}: {_describe(exchange)}" for exchange in program.collectives]
    lines += ["", *(f"{'pass' if c.passed else 'FAIL'}  {c.claim}: {c.seen}" for c in outcome)]
    return "\n".join(lines)


def _side_by_side(result: Result) -> Iterator[str]:
    erm, own, floor = result.erm, result.program, result.floor
    numbers = [
        ("GFLOP", erm.flops / 1e9, own.flops / 1e9),
        ("GB read and written", erm.bytes_accessed / 1e9, own.bytes_accessed / 1e9),
        ("MB exchanged", erm.exchanged_bytes / 1e6, own.exchanged_bytes / 1e6),
        ("collectives", len(erm.collectives), len(own.collectives)),
        ("MiB memory", erm.memory_bytes / 2**20, own.memory_bytes / 2**20),
    ]
    numbers += [
        (f"  {name}", erm.memory[name] / 2**20, own.memory[name] / 2**20) for name in erm.memory
    ]
    numbers += [("compile seconds", erm.compile_s, own.compile_s)]
    yield f"{'per device':<20} {'ERM':>10} {'method':>10} {'ratio':>8}"
    for name, plain, value in numbers:
        ratio = f"{value / plain:8.3f}" if plain else f"{'-':>8}"
        yield f"{name:<20} {plain:>10.2f} {value:>10.2f} {ratio}"
        if name == "GFLOP":
            yield f"{'  floor':<20} {'':>10} {floor * plain:>10.2f} {floor:8.3f}"


def _describe(exchange: hlo.Collective) -> str:
    counts = Counter(map(str, exchange.arrays))
    largest = sorted(counts, key=lambda text: -hlo.Array.parse(text).bytes)
    shown = [f"{counts[text]} x {text}" if counts[text] > 1 else text for text in largest[:4]]
    shown += [f"{len(counts) - 4} other shapes"] if len(counts) > 4 else []
    return f"{exchange.kind} {exchange.bytes / 1e6:.3f} MB: {', '.join(shown)}"


COLUMNS = (
    "chips", "model", "dtype", "C", "method", "shape", "GFLOP", "x ERM", "floor", "GB", "x ERM",
    "MB exchanged", "ERM", "collectives", "MiB", "ERM", "compile s", "checks",
)  # fmt: skip


def cells(result: Result, outcome: Sequence[Check]) -> list[str]:
    """A case below `COLUMNS`; `checks` is the number passed of the number made."""
    setting, method, erm, own = result.setting, result.method, result.erm, result.program
    steps = f" K={method.steps}" if method.mode == "cold" else ""
    case = (
        tpu.topology(setting.topology).chips, setting.model, setting.dtype, setting.num_classes,
        f"{method.mode}{steps} at {method.layer}", method.shape,
    )  # fmt: skip
    if result.refused:
        costs = ["does not fit", *["-"] * (len(COLUMNS) - len(case) - 2)]
    else:
        costs = [
            f"{own.flops / 1e9:.1f}", f"{own.flops / erm.flops:.3f}", f"{result.floor:.3f}",
            f"{own.bytes_accessed / 1e9:.2f}", f"{own.bytes_accessed / erm.bytes_accessed:.2f}",
            f"{own.exchanged_bytes / 1e6:.2f}", f"{erm.exchanged_bytes / 1e6:.2f}",
            str(len(own.collectives)),
            f"{own.memory_bytes / 2**20:.0f}", f"{erm.memory_bytes / 2**20:.0f}",
            f"{own.compile_s:.0f}",
        ]  # fmt: skip
    passed = f"{sum(check.passed for check in outcome)}/{len(outcome)}"
    return [*map(str, case), *costs, passed]
