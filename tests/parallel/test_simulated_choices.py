"""How tokens choose on paper: probabilities against all sets of experts, one by one."""

from itertools import combinations
from math import prod

import numpy as np
import pytest

from moeyard.errors import ConfigError
from moeyard.parallel.simulation.choices import Choices, skewed

ODDS = np.array([4.0, 1.0, 2.5, 0.3, 1.2, 0.0])


def all_sets(odds_E, k):
    """Return every set of K experts with its probability."""
    sets = list(combinations(range(len(odds_E)), k))
    weights = [prod(odds_E[e] for e in chosen) for chosen in sets]
    return [(chosen, weight / sum(weights)) for chosen, weight in zip(sets, weights, strict=True)]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_visits_of_experts_and_ranks_are_sums_over_all_sets(k):
    choices = Choices(ODDS, k)
    visits_E = [sum(p for s, p in all_sets(ODDS, k) if e in s) for e in range(6)]
    assert choices.visits_E() == pytest.approx(visits_E)
    assert choices.visits_E().sum() == pytest.approx(k)
    shares_RE = np.zeros((3, 6))
    shares_RE[[0, 0, 1, 1, 2, 2], range(6)] = 1
    owners = [0, 0, 1, 1, 2, 2]
    visits_R = [
        sum(p for s, p in all_sets(ODDS, k) if rank in {owners[e] for e in s}) for rank in range(3)
    ]
    assert choices.visits_R(shares_RE) == pytest.approx(visits_R)


def test_a_copied_expert_sends_its_share_to_each_holder():
    shares_RE = np.array([[0.5, 1.0, 0.0], [0.5, 0.0, 1.0]])
    found = Choices(np.ones(3), 1).visits_R(shares_RE)
    assert found == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_loads_come_back_from_the_odds_they_give(k):
    load_E = np.array([50, 20, 10, 5, 5, 4, 3, 3])
    visits_E = Choices.of_loads(load_E, k).visits_E()
    assert visits_E.sum() == pytest.approx(k)
    shares_E = k * load_E / load_E.sum()
    if k == 1:
        assert visits_E == pytest.approx(shares_E, rel=1e-4)
    else:  # a token visits an expert once
        assert visits_E.max() <= 1 + 1e-6
        rest = shares_E[1:] / shares_E[1:].sum()
        assert visits_E[1:] / visits_E[1:].sum() == pytest.approx(rest, rel=0.3)


def test_even_loads_make_every_set_equally_likely():
    found = Choices.of_loads(np.full(8, 3), 2)
    assert found.odds_E == pytest.approx(np.full(8, found.odds_E[0]))
    assert Choices.of_loads(np.zeros(8), 2).visits_E() == pytest.approx(np.full(8, 0.25))
    few = Choices.of_loads(np.array([5, 0, 0, 0]), 2).visits_E()
    assert few.sum() == pytest.approx(2) and few[0] == pytest.approx(1, abs=1e-3)


def test_zipf_is_its_law_for_one_choice_and_the_same_in_each_call():
    layers = skewed("zipf:1", 8, 1, 3)
    law = sorted((1 / np.arange(1, 9)) / (1 / np.arange(1, 9)).sum())
    for choices in layers:
        assert sorted(choices.visits_E()) == pytest.approx(law)
    assert not np.array_equal(layers[0].odds_E, layers[1].odds_E)
    again = skewed("zipf:1", 8, 1, 3)
    assert all(np.array_equal(a.odds_E, b.odds_E) for a, b in zip(layers, again, strict=True))


@pytest.mark.parametrize("text", ["zipf", "zipf:-1", "zipf:99", "hot", ""])
def test_other_skews_are_refused_in_a_sentence(text):
    with pytest.raises(ConfigError, match=r"write zipf:1\.0 with an exponent"):
        skewed(text, 8, 2, 1)
