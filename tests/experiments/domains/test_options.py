"""Options of methods where the domain generalization experiment has defaults of its own."""

import pytest

from experiments import domain_generalization
from experiments.domains import flags as domain_flags
from experiments.methods import search
from tests.helpers.commands import parsed


def options(method, *arguments, found=None):
    with parsed(domain_generalization, arguments):
        train_steps = domain_flags.settings().train_steps
        return domain_flags.options_for(method, found or {}, train_steps)


@pytest.mark.parametrize("name", ["irm", "vrex"])
def test_annealing_ends_after_a_tenth_of_the_run_unless_tuned_or_given(name):
    key = f"{name}.anneal_steps"
    assert options(name)[key] == 30
    assert options(f"coral+{name}", "--train_steps=5000")[key] == 500
    assert options(name, found={key: 7})[key] == 7
    assert options(name, f"--option={key}=9", found={key: 7})[key] == 9
    assert options("erm", f"--option={key}=9") == {}


@pytest.mark.parametrize("name", ["irm", "vrex"])
def test_a_penalty_that_would_never_reach_its_weight_is_refused_by_name(name):
    key = f"{name}.anneal_steps"
    message = f"--option={key} must be below --train_steps=300, .*got"
    with pytest.raises(ValueError, match=f"{message} 300"):
        options(name, f"--option={key}=300")
    with pytest.raises(ValueError, match=f"{message} 500"):
        options(name, found={key: 500})


def test_drawn_annealing_ends_within_the_run_and_is_as_ever_for_the_default_length():
    hidden = search.HiddenLayers(("hidden1",))
    for steps, allowed in ((300, {0, 50, 100, 200}), (60, {0, 10, 20, 40})):
        with parsed(domain_generalization, [f"--train_steps={steps}"]):
            ranges = domain_flags.search_ranges()
        drawn = [search.draw("irm", trial, hidden, ranges=ranges) for trial in range(20)]
        assert {draw["irm.anneal_steps"] for draw in drawn} == allowed
        if steps == 300:
            assert [draw["irm.anneal_steps"] for draw in drawn] == [
                search.draw("irm", trial, hidden)["irm.anneal_steps"] for trial in range(20)
            ]


def test_mixup_has_domainbeds_alpha_unless_tuned_or_given():
    assert options("mixup") == {"mixup.alpha": 0.2}
    assert options("mixup", found={"mixup.alpha": 0.5}) == {"mixup.alpha": 0.5}
    assert options("mixup", "--option=mixup.alpha=0.7") == {"mixup.alpha": 0.7}
    assert options("manifold_mixup@input") == {}
