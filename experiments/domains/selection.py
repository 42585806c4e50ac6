"""Model selection of DomainBed: which draw and which checkpoint a test domain is reported with.

Only `oracle` looks at the test domain to choose. The accuracy that is reported is always that on
the test domain's `in` part, as in DomainBed; its `out` part is the oracle's validation set.

Source: Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021, section 3.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

TRAINING_DOMAIN_VALIDATION = "training_domain_validation"
LEAVE_ONE_DOMAIN_OUT = "leave_one_domain_out"
ORACLE = "oracle"

# {"step": steps done, "in": {domain: accuracy}, "out": {domain: accuracy}}
Record = Mapping[str, Any]


class Trained(NamedTuple):
    """One trained network.

    Attributes:
      held_out: the domains that it was not trained on, one or two.
      draw: number of its hyperparameters.
      records: its evaluations in order; none if it diverged.
    """

    held_out: frozenset[str]
    draw: int
    records: Sequence[Record]


class Selected(NamedTuple):
    """What a selection chose.

    Attributes:
      accuracy: on the `in` part of the test domain.
      validation: what was maximised.
      draw: number of the hyperparameters.
      step: of the checkpoint.
      tied: number of candidates with that validation accuracy, this one included.
    """

    accuracy: float
    validation: float
    draw: int
    step: int
    tied: int = 1


def training_domain_validation(trainings: Iterable[Trained], test: str) -> Selected | None:
    """Draw and step with the highest mean accuracy on the holdouts of the training domains.

    >>> records = [{"step": 1, "in": {"a": 0.3}, "out": {"a": 0.0, "b": 0.8}}]
    >>> training_domain_validation([Trained(frozenset("a"), 0, records)], "a")
    Selected(accuracy=0.3, validation=0.8, draw=0, step=1, tied=1)
    """
    return _best(
        Selected(record["in"][test], holdout_accuracy(record, [test]), t.draw, record["step"])
        for t in _testing(trainings, test)
        for record in t.records
    )


def leave_one_domain_out(
    trainings: Sequence[Trained], test: str, domains: Sequence[str]
) -> Selected | None:
    """Draw and step with the highest mean accuracy on training domains that were left out, too.

    The network for (test, step, draw) is judged by those trained without the test domain and one
    more domain e, at the same step: mean over e of their accuracy on e's `in` part. None unless a
    draw has such networks for every e.
    """
    others = [domain for domain in domains if domain != test]
    pairs = {(t.held_out, t.draw): t for t in trainings if len(t.held_out) == 2}

    def candidates():
        for training in _testing(trainings, test):
            left_out = {e: pairs.get((frozenset((test, e)), training.draw)) for e in others}
            if not others or None in left_out.values():
                continue
            at = {e: {r["step"]: r["in"][e] for r in t.records} for e, t in left_out.items()}
            for record in training.records:
                step = record["step"]
                if all(step in accuracies for accuracies in at.values()):
                    validation = float(np.mean([accuracies[step] for accuracies in at.values()]))
                    yield Selected(record["in"][test], validation, training.draw, step)

    return _best(candidates())


def oracle(trainings: Iterable[Trained], test: str) -> Selected | None:
    """Draw with the highest accuracy on the test domain's holdout after the last step.

    The test domain chooses the hyperparameters here, so this is no result on an unseen domain; no
    checkpoint but the last is looked at.

    >>> records = [{"step": s, "in": {"a": 0.3 / s}, "out": {"a": 0.2}} for s in (1, 2)]
    >>> oracle([Trained(frozenset("a"), 0, records)], "a")
    Selected(accuracy=0.15, validation=0.2, draw=0, step=2, tied=1)
    """
    return _best(
        Selected(
            t.records[-1]["in"][test], t.records[-1]["out"][test], t.draw, t.records[-1]["step"]
        )
        for t in _testing(trainings, test)
        if t.records
    )


def select(
    trainings: Sequence[Trained], test: str, domains: Sequence[str]
) -> dict[str, Selected | None]:
    """All three by name; None where the networks that a selection needs are not there."""
    rules: dict[str, Callable[[], Selected | None]] = {
        TRAINING_DOMAIN_VALIDATION: lambda: training_domain_validation(trainings, test),
        LEAVE_ONE_DOMAIN_OUT: lambda: leave_one_domain_out(trainings, test, domains),
        ORACLE: lambda: oracle(trainings, test),
    }
    return {name: rule() for name, rule in rules.items()}


def holdout_accuracy(record: Record, held_out: Iterable[str]) -> float:
    """Mean accuracy on the `out` parts of the domains that are not held out."""
    held_out = set(held_out)
    return float(np.mean([value for d, value in record["out"].items() if d not in held_out]))


def best_validation(records: Iterable[Record], held_out: Iterable[str]) -> float | None:
    """`holdout_accuracy` at the best checkpoint; None if the network diverged.

    >>> best_validation([{"out": {"b": 0.5}}, {"out": {"b": 0.7}}], held_out=["a"])
    0.7
    """
    held_out = set(held_out)
    return max((holdout_accuracy(record, held_out) for record in records), default=None)


def _testing(trainings: Iterable[Trained], test: str) -> list[Trained]:
    return [training for training in trainings if training.held_out == {test}]


def _best(candidates: Iterable[Selected]) -> Selected | None:
    """The one with the highest validation accuracy; of equals the first draw, the first step."""
    found = list(candidates)
    if not found:
        return None
    best = max(found, key=lambda s: (s.validation, -s.draw, -s.step))
    return best._replace(tied=sum(other.validation == best.validation for other in found))


def tie_note(selected: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line about results in whose selection several candidates were the best.

    Args:
      selected: of each result, what every selection chose, as plain values.
    """
    tied = {
        name: sum(found.get(name, {}).get("tied", 1) > 1 for found in selected)
        for name in (TRAINING_DOMAIN_VALIDATION, LEAVE_ONE_DOMAIN_OUT, ORACLE)
    }
    of_rules = [f"{n} by {name.replace('_', ' ')}" for name, n in tied.items() if n]
    if not of_rules:
        return []
    return [
        f"Ties: of {len(selected)} selections, {' and '.join(of_rules)} had several draws or "
        "checkpoints with the highest validation accuracy. The first is reported; DomainBed takes "
        "the last."
    ]
