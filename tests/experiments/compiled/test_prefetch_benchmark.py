"""The benchmark of prefetching: its table, its flags, what it refuses."""

import pytest
from absl import flags

from experiments import prefetch_benchmark
from tests.helpers.module_call import call, printed_rows

FLAGS = flags.FLAGS
TINY = ("--model=mlp", "--image_size=4", "--file_size=8", "--images=9", "--batch_size=4",
        "--steps=2", "--rounds=2")  # fmt: skip


def test_every_source_has_a_row_with_and_without_prefetching():
    message, out = call(prefetch_benchmark, *TINY)
    assert message is None
    header, *cells = printed_rows(out)
    assert header[:4] == ["source", "steps/s without", "with", "ratio"]
    assert [row[0] for row in cells] == ["memory", "files", "files, read ahead"]
    for _, plain, prefetched, ratio, span in cells:
        lowest, highest = map(float, span.split(" to "))
        assert float(plain) > 0 and float(prefetched) > 0
        assert lowest - 0.01 <= float(ratio) <= highest + 0.01


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--rounds=0", "--rounds=0"),
        ("--model=none", "--model=none"),
        ("--model=vit", "patch must divide the image size"),
    ],
)
def test_bad_flags_get_one_line_that_names_them(argument, expected):
    message, _ = call(prefetch_benchmark, *TINY, argument)
    assert message is not None and expected in message and "\n" not in message
