"""Owners by load and by what is chosen together; arguments that do not fit."""

import numpy as np
import pytest
import torch

from moeyard.configuration import validate_config
from moeyard.errors import ConfigError
from moeyard.parallel.planning.placement import Placement
from moeyard.serving.expert_parallel.placement_file import count_together
from moeyard.serving.expert_parallel.rebalance import better_owners, fullest_rows
from moeyard.serving.expert_parallel.spread import spread
from moeyard.serving.serve_args import ServeArgs


def counted(experts_NK, num_experts):
    seen = np.zeros((1, num_experts, num_experts))
    count_together(seen, experts_NK[:, None])
    return seen[0]


def fullest_per_token(owner_E, experts_NK, num_owners):
    """Return the mean number of a token's experts on its fullest owner."""
    owner_NK = np.array(owner_E)[experts_NK]
    return np.mean([np.bincount(row, minlength=num_owners).max() for row in owner_NK])


def test_pairs_are_counted_and_no_expert_is_none():
    experts_NK = np.array([[0, 2], [2, -1], [2, 0]])
    seen = counted(experts_NK, 3)
    assert seen.tolist() == [[2, 0, 2], [0, 0, 0], [2, 0, 3]]


@pytest.mark.parametrize("num_owners", [2, 3, 4])
def test_experts_that_are_chosen_together_get_different_owners(num_owners):
    # Neighbours come together: 0 with 1, 2 with 3, ...; contiguous owners hold most pairs.
    rng = np.random.default_rng(3)
    first = 2 * rng.integers(0, 6, 500)
    experts_NK = np.stack([first, first + 1], axis=1)
    owner_E = spread(counted(experts_NK, 12), 500, num_owners)
    assert fullest_per_token(owner_E, experts_NK, num_owners) == 1.0
    contiguous = Placement.contiguous(12, num_owners).owner_E
    assert fullest_per_token(contiguous, experts_NK, num_owners) > 1.6
    sizes = np.bincount(owner_E, minlength=num_owners)
    assert sizes.max() - sizes.min() <= 1


def test_loads_are_balanced_where_nothing_is_chosen_together():
    load = np.array([50, 30, 20, 20, 15, 15, 25, 25])
    experts_NK = np.repeat(np.arange(8), load)[:, None]
    owner_E = np.array(spread(counted(experts_NK, 8), len(experts_NK), 2))
    assert abs(load[owner_E == 0].sum() - load[owner_E == 1].sum()) <= 10


def test_each_owner_gets_equally_many_experts_to_within_one():
    rng = np.random.default_rng(1)
    for num_experts, num_owners in ((7, 2), (8, 3), (5, 5), (9, 4), (6, 1)):
        experts_NK = rng.integers(0, num_experts, (200, 2))
        owner_E = spread(counted(experts_NK, num_experts), 200, num_owners)
        sizes = np.bincount(owner_E, minlength=num_owners)
        assert sizes.max() - sizes.min() <= 1 and len(owner_E) == num_experts


def test_experts_move_only_where_the_fullest_owner_gains():
    even = {3: Placement.contiguous(4, 2), 5: Placement.contiguous(4, 2)}
    assert better_owners(even, torch.tensor([[5, 5, 5, 5], [4, 6, 5, 5]]), 2) is None
    skewed = torch.tensor([[50, 40, 1, 1], [5, 5, 5, 5]])
    found = better_owners(even, skewed, 2)
    assert found.keys() == even.keys()
    before, after = list(even.values()), list(found.values())
    assert fullest_rows(after, skewed) < 0.7 * fullest_rows(before, skewed)
    assert sum(p.owner_E.count(0) for p in after) == 4


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"expert_placement": "p.json", "expert_parallel": 1}, "but expert-parallel is 1; set it"),
        ({"expert_memory": "auto"}, "budget of each owner; give a size such as 8GiB or 25%."),
        ({"expert_predictor": "next_gates"}, "expert-predictor is set, which expert-parallel 2"),
        ({"expert_sparsity": "exact"}, "expert-sparsity is set, which expert-parallel 2"),
        ({"host_memory": "1GiB"}, "host-memory is set, which expert-parallel 2 does not offer"),
        ({"lora": ["a=b"]}, "lora is set, which expert-parallel 2 does not offer"),
        ({"allow_lora_updates": True}, "allow-lora-updates is set, which expert-parallel 2"),
        ({"expert_log": "logs"}, "expert-log is set, which expert-parallel 2 does not offer"),
        ({"expert_fallback": "f"}, "expert-fallback is set, which expert-parallel 2"),
        ({"expert_parallel": 0}, "expert_parallel"),
    ],
)
def test_arguments_that_do_not_fit_are_one_sentence(values, sentence):
    with pytest.raises(ConfigError) as raised:
        validate_config(ServeArgs, {"model": "m", "expert_parallel": 2} | values)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_owners_need_nothing_else():
    args = validate_config(ServeArgs, {"model": "m", "expert_parallel": 2, "host_memory": "0"})
    assert args.expert_parallel == 2 and args.expert_placement is None
