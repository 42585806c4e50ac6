"""Several processes: whether all of them found the same in their working folder.

Each reads checkpoints and results for itself. One that sees no checkpoint, or takes the newest for
damaged, would begin at another step than the others; their collectives match all the same, and
gradients of different parameters would be averaged without a word.
"""

import hashlib
import json
import pathlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

# In place of a step, where it is not yet asked for.
FINISHED, UNFINISHED = -1, -2
_RECORD = struct.Struct("<q32s32s")
_REMEDY = "--workdir must be on a file system that all hosts share"


class DifferingHostsError(RuntimeError):
    """Processes of a run found different things; all of them raise it, before anything is written.

    The message is one line that says who found what.
    """


class Found(NamedTuple):
    """What a process found of a run.

    Attributes:
      step: of the checkpoint that it would go on from, 0 without any; or FINISHED, UNFINISHED.
      run: digest of what it is about to train.
      checkpoint: digest of that checkpoint.
    """

    step: int
    run: bytes
    checkpoint: bytes


def check(
    folder: pathlib.Path,
    run: Any,
    step: int,
    checkpoint: str = "",
    rejected: Sequence[str] = (),
) -> None:
    """Compares what all processes found; each of them must ask. One process agrees with itself.

    Args:
      folder: where it was found, for the message.
      run: what is about to be trained, as JSON values.
      step: see `Found`.
      checkpoint: what tells a checkpoint from others of the same step.
      rejected: lines about newer checkpoints that this process takes for damaged.

    Raises:
      ValueError: there are other processes, and this one has not joined them.
      DifferingHostsError: they differ.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"--multihost is missing: this is one of {jax.process_count()} processes that share "
            "an accelerator, and each would write what one of them must"
        )
    found = Found(step, _digest(json.dumps(run, sort_keys=True)), _digest(checkpoint))
    differing = difference(_from_all(found))
    if differing is not None:
        reasons = f" ({'; '.join(rejected)})" if rejected else ""
        raise DifferingHostsError(f"{folder}: {differing}{reasons}")


def difference(found: Sequence[Found]) -> str | None:
    """Who differs from process 0 in what, and what to do about it; None where nobody does.

    Args:
      found: what the processes found, in their order.

    >>> start = Found(0, b"run", b"")
    >>> difference([start, start])
    >>> difference([start, start._replace(step=8)]).partition(";")[0]
    'process 0 finds no checkpoint (step 0), process 1 the checkpoint of step 8'
    """
    first = found[0]
    differing = [number for number, other in enumerate(found) if other != first]
    if not differing:
        return None
    number = differing[0]
    other = found[number]
    if other.run != first.run:
        return (
            f"processes 0 and {number} are about to train different things; "
            f"all need the same flags and data, and {_REMEDY}"
        )
    if other.step == first.step:
        two = f"processes 0 and {number} find different checkpoints"
        return f"{two} of step {first.step}; {_REMEDY}"
    return f"process 0 finds {_words(first)}, process {number} {_words(other)}; {_REMEDY}"


def _words(found: Found) -> str:
    special = {
        FINISHED: "a finished run",
        UNFINISHED: "an unfinished run",
        0: "no checkpoint (step 0)",
    }
    return special.get(found.step, f"the checkpoint of step {found.step}")


def _from_all(found: Found) -> list[Found]:
    """What every process found, in their order."""
    own = np.frombuffer(_RECORD.pack(*found), np.uint8)
    records = multihost_utils.process_allgather(own)
    return [Found(*_RECORD.unpack(record.tobytes())) for record in records]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
