"""BASE: a balanced assignment in training, the best expert in evaluation. T tokens, E experts."""

import itertools
import math

import pytest
import torch

import moeyard
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput

D, E = 6, 3


def build(num_experts=E):
    torch.manual_seed(0)
    return moeyard.router("base").build(RouterSizes(D, num_experts)).double()


def rows(*lengths, valid=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(sum(lengths), D, generator=generator, dtype=torch.float64)
    valid_T = None if valid is None else torch.tensor(valid)
    return RouterInput(x_TD=x_TD + 1, lengths=lengths, valid_T=valid_T)


def best_balanced(affinity_TE):
    """Try all assignments whose sizes differ by at most one."""
    num_rows = len(affinity_TE)
    sizes = {num_rows // E, -(-num_rows // E)}
    return max(
        (
            experts
            for experts in itertools.product(range(E), repeat=num_rows)
            if {experts.count(expert) for expert in range(E)} <= sizes
        ),
        key=lambda experts: sum(float(a[e]) for a, e in zip(affinity_TE, experts, strict=True)),
    )


@torch.no_grad()
def test_each_sequence_gets_its_best_balanced_assignment():
    gate, given = build(), rows(7, 6, 2)
    affinity_TE = given.x_TD @ gate.weight.T
    expected = [expert for part in affinity_TE.split([7, 6, 2]) for expert in best_balanced(part)]
    routing = gate.route(given)
    assert routing.experts_TK.flatten().tolist() == expected
    assert affinity_TE.argmax(1).tolist() != expected  # balance costs something here
    weights = [1 / (1 + math.exp(-float(a[e]))) for a, e in zip(affinity_TE, expected, strict=True)]
    torch.testing.assert_close(routing.weights_TK.flatten(), torch.tensor(weights).double())
    assert routing.counts_E.tolist() == [expected.count(expert) for expert in range(E)]


@torch.no_grad()
def test_rows_that_are_not_valid_take_no_place():
    gate = build()
    given = rows(8, valid=[True, False, True, True, False, True, True, True])
    routing = gate.route(given)
    alone = gate.route(RouterInput(x_TD=given.x_TD[given.valid_T]))
    assert torch.equal(routing.experts_TK[given.valid_T], alone.experts_TK)
    assert routing.counts_E.tolist() == [2, 2, 2]


@torch.no_grad()
def test_evaluation_takes_the_largest_affinity_of_each_row():
    gate, given = build().eval(), rows(9)
    expected = [max(range(E), key=lambda e, a=a: float(a[e])) for a in given.x_TD @ gate.weight.T]
    assert gate.route(given).experts_TK.flatten().tolist() == expected


def test_centroids_learn_through_the_weights_only():
    gate, given = build(), rows(9)
    routing = gate.route(given)
    routing.weights_TK.sum().backward()
    expected = torch.zeros(E, D, dtype=torch.float64)
    for x, expert, weight in zip(
        given.x_TD, routing.experts_TK.flatten(), routing.weights_TK.detach().flatten(), strict=True
    ):
        expected[expert] += weight * (1 - weight) * x
    torch.testing.assert_close(gate.weight.grad, expected)
    assert gate.losses(routing, None).terms == ()


@pytest.mark.parametrize("num_experts", [3, 9])
def test_centroids_begin_orthogonal_with_a_length_of_a_tenth(num_experts):
    gate = build(num_experts)
    weight_ED = gate.initialize("weight", torch.Generator().manual_seed(2))
    assert torch.equal(weight_ED, gate.initialize("weight", torch.Generator().manual_seed(2)))
    small = weight_ED if num_experts < D else weight_ED.T
    torch.testing.assert_close(small @ small.T, 0.01 * torch.eye(len(small)))


def test_values_that_are_not_numbers_reach_the_weights():
    gate, given = build(), rows(7)
    given.x_TD[2] = torch.nan
    given.x_TD[3] = torch.inf
    routing = gate.route(given)
    assert routing.weights_TK[2].isnan() and int(routing.counts_E.sum()) == 7


def test_rounding_does_not_tell_the_rows_of_a_repeated_token_apart():
    gate, given = build(), rows(4)
    x_TD = given.x_TD.repeat_interleave(4, dim=0)
    expected = gate.route(RouterInput(x_TD=x_TD)).experts_TK
    for seed in range(5):
        noise_TD = torch.randn(16, D, generator=torch.Generator().manual_seed(seed)) * 1e-14
        assert torch.equal(gate.route(RouterInput(x_TD=x_TD + noise_TD)).experts_TK, expected)
