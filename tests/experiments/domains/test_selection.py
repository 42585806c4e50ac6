"""Model selection against records written by hand."""

import pytest

from experiments.domains import selection as domain_selection
from experiments.domains.selection import Selected, Trained
from experiments.reporting import frame

DOMAINS = ("a", "b", "c")


def record(step, inside, outside):
    parts = {"in": inside, "out": outside}
    return {"step": step} | {
        name: dict(zip(DOMAINS, of, strict=True)) for name, of in parts.items()
    }


def network(held_out, draw, *checkpoints):
    """Trained without some domains; of each checkpoint, what `record` takes."""
    records = [record(10 * number, *parts) for number, parts in enumerate(checkpoints, 1)]
    return Trained(frozenset(held_out), draw, records)


# Two draws that were trained on b and c. Mean holdout accuracies of b and c, by draw and step:
# 0.5, 0.7 and 0.6, 0.65. On the test domain's own holdout draw 1 is the best, after its last step.
TESTING = [
    network("a", 0, ((0.11, 0.9, 0.9), (0.99, 0.4, 0.6)), ((0.12, 0.9, 0.9), (0.20, 0.6, 0.8))),
    network("a", 1, ((0.13, 0.9, 0.9), (0.30, 0.5, 0.7)), ((0.14, 0.9, 0.9), (0.40, 0.6, 0.7))),
]
# Without a and b, and without a and c: the `in` accuracies of b and c there decide, by draw and
# step (0.3 + 0.5) / 2, (0.2 + 0.2) / 2 and (0.8 + 0.1) / 2, (0.3 + 0.3) / 2.
ONES, ZEROS = (1.0,) * 3, (0.0,) * 3
PAIRS = [
    network("ab", 0, ((0.9, 0.3, 0.9), ONES), ((0.9, 0.2, 0.9), ONES)),
    network("ac", 0, ((0.9, 0.9, 0.5), ONES), ((0.9, 0.9, 0.2), ONES)),
    network("ab", 1, ((0.9, 0.8, 0.9), ZEROS), ((0.9, 0.3, 0.9), ZEROS)),
    network("ac", 1, ((0.9, 0.9, 0.1), ZEROS), ((0.9, 0.9, 0.3), ZEROS)),
]


def test_training_domain_validation_takes_the_best_draw_and_step_of_the_training_domains():
    found = domain_selection.training_domain_validation([*PAIRS, *TESTING], "a")
    assert found == Selected(0.12, pytest.approx(0.7), draw=0, step=20)


def test_the_oracle_takes_the_last_step_of_the_draw_that_is_best_on_the_test_domain():
    assert domain_selection.oracle([*PAIRS, *TESTING], "a") == Selected(0.14, 0.40, 1, 20)


def test_leave_one_domain_out_takes_what_is_best_on_domains_left_out_as_well():
    found = domain_selection.leave_one_domain_out([*TESTING, *PAIRS], "a", DOMAINS)
    assert found == Selected(0.13, pytest.approx(0.45), draw=1, step=10)


def test_leave_one_domain_out_passes_over_draws_that_lack_a_pair():
    trainings = [*TESTING, *PAIRS[:3]]
    found = domain_selection.leave_one_domain_out(trainings, "a", DOMAINS)
    assert found == Selected(0.11, pytest.approx(0.4), draw=0, step=10)
    assert domain_selection.leave_one_domain_out(TESTING, "a", DOMAINS) is None
    assert domain_selection.select(TESTING, "a", DOMAINS)["leave_one_domain_out"] is None


def test_a_diverged_draw_is_never_chosen():
    trainings = [network("a", 7), *TESTING]
    assert domain_selection.oracle(trainings, "a").draw == 1
    assert domain_selection.training_domain_validation(trainings, "a").draw == 0
    assert domain_selection.training_domain_validation(trainings[:1], "a") is None
    pairs = [*PAIRS[:3], network("ac", 1)]
    found = domain_selection.leave_one_domain_out([*TESTING, *pairs], "a", DOMAINS)
    assert found.draw == 0


def test_of_equal_validation_accuracies_the_first_draw_and_checkpoint_win():
    records = [record(step, (step / 100, 1, 1), (1, 0.5, 0.5)) for step in (10, 20)]
    trainings = [Trained(frozenset("a"), draw, records) for draw in (1, 0)]
    found = domain_selection.training_domain_validation(trainings, "a")
    assert found == Selected(0.1, 0.5, 0, 10, tied=4)
    (line,) = domain_selection.tie_note(
        [
            {domain_selection.ORACLE: found._asdict() | {"tied": 1}},
            {domain_selection.TRAINING_DOMAIN_VALIDATION: found._asdict()},
        ]
    )
    assert "of 2 selections, 1 by training domain validation had" in line


def test_only_the_oracle_depends_on_accuracies_of_the_test_domain():
    """What is chosen does not change with what the networks score on the test domain."""

    def scrambled(training):
        records = [
            {
                "step": r["step"],
                "in": r["in"] | {"a": 1 - r["in"]["a"]},
                "out": r["out"] | {"a": 1 - r["out"]["a"]},
            }
            for r in training.records
        ]
        return training._replace(records=records)

    before = domain_selection.select([*TESTING, *PAIRS], "a", DOMAINS)
    after = domain_selection.select([scrambled(t) for t in (*TESTING, *PAIRS)], "a", DOMAINS)
    same = {name: before[name][1:] == after[name][1:] for name in before}
    assert same == {
        "training_domain_validation": True,
        "leave_one_domain_out": True,
        "oracle": False,
    }


def test_a_seed_counts_once_with_the_mean_over_its_test_domains():
    results = [
        {
            "method": "erm",
            "seed": seed,
            "test_domain": domain,
            "accuracy": accuracy,
            "selections": {"oracle": accuracy, "leave_one_domain_out": None},
            "seconds": 2.0,
        }
        for seed, domain, accuracy in ((0, "a", 0.2), (1, "a", 0.6), (0, "b", 0.4), (1, "b", 0.8))
    ]
    every = frame.tidy({"erm": results})
    assert frame.selections(every) == ["oracle"]
    values, left_out = frame.values_of(every, "oracle")
    of_seed = values.set_index(["seed", "measure"])["value"]
    assert [of_seed[seed, "accuracy"] for seed in (0, 1)] == pytest.approx([0.3, 0.7])
    assert (of_seed[1, "a"], of_seed[1, "b"], left_out) == (0.6, 0.8, [])
