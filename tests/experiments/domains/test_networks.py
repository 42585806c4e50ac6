"""Programs of the networks of domain generalization: which of them share the compilation."""

import types

import pytest

from experiments.domains.networks import Training, Trainings
from tests.helpers.protocols import DOMAINS, DomainRuns


@pytest.fixture(scope="module")
def runs(data_dir):
    return DomainRuns(data_dir)


def test_methods_that_compare_domains_are_trained_on_the_one_that_a_pair_of_three_leaves(runs):
    for method in ("coral", "group_dro", "irm", "vrex"):
        runs.job(method, {}, held_out=DOMAINS[:2])
    two = types.SimpleNamespace(names=("a", "b"))
    with pytest.raises(ValueError, match="coral in 'coral' compares training domains, but only 1 "):
        Trainings(runs.settings, two, None).program(Training("coral", {}, ("a",), 0))


def test_all_sets_of_as_many_domains_share_a_program_unless_it_holds_class_sizes(runs):
    def place(method, options, **of):
        return runs.job(method, options, **of).program.place

    confidence = {"lpa.assignment": "confidence"}
    shared = place("lpa", confidence)
    assert place("lpa", confidence, held_out=("-90%",), seed=1) == shared
    assert place("lpa", confidence, held_out=("+90%", "-90%")) != shared
    assert place("lpa", {}) != place("lpa", {}, held_out=("-90%",), seed=1)
