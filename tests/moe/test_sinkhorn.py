"""Top-k of a balanced plan against Megatron's algorithm. T tokens, E experts."""

import math

import pytest
import torch

import moeyard
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.sinkhorn import balanced_plan

D, E = 6, 4


def build(**fields):
    torch.manual_seed(0)
    return moeyard.router("sinkhorn", **fields).build(RouterSizes(D, E)).double()


def rows(*lengths, valid=None, skew=1.0):
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(sum(lengths), D, generator=generator, dtype=torch.float64)
    valid_T = None if valid is None else torch.tensor(valid)
    return RouterInput(x_TD=x_TD + skew, lengths=lengths, valid_T=valid_T)


def plan_by_hand(logits, tolerance=1e-4):
    """Megatron's loop on plain numbers, on ``exp(z - max of the row)``."""
    cost = [[math.exp(z - max(row)) for z in row] for row in logits.tolist()]
    num_rows, d1 = len(cost), [1.0] * E
    while True:
        old = d1
        d0 = [
            1 / num_rows / (sum(c * s for c, s in zip(row, d1, strict=True)) + 1e-8) for row in cost
        ]
        sums = [sum(row[e] * s for row, s in zip(cost, d0, strict=True)) for e in range(E)]
        d1 = [1 / E / (total + 1e-8) for total in sums]
        if sum(abs(new - last) for new, last in zip(d1, old, strict=True)) / E <= tolerance:
            return [[d0[t] * cost[t][e] * d1[e] for e in range(E)] for t in range(num_rows)]


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2])
def test_choices_are_the_largest_of_each_sequence_plan(k):
    gate, given = build(k=k), rows(9, 6)
    logits_TE = given.x_TD @ gate.weight.T
    plan = [row for part in logits_TE.split([9, 6]) for row in plan_by_hand(part)]
    expected = [sorted(range(E), key=lambda e, row=row: -row[e])[:k] for row in plan]
    routing = gate.route(given)
    assert routing.experts_TK.tolist() == expected
    scores_TE = logits_TE.sigmoid() if k == 1 else logits_TE.exp() / logits_TE.exp().sum(1, True)
    weights = [[float(s[e]) for e in chosen] for s, chosen in zip(scores_TE, expected, strict=True)]
    torch.testing.assert_close(routing.weights_TK, torch.tensor(weights, dtype=torch.float64))


def test_a_plan_is_balanced_and_that_of_unshifted_logits():
    logits_TE = torch.randn(12, E, generator=torch.Generator().manual_seed(3)).double() * 2
    plan_TE = balanced_plan(logits_TE, 1e-12, 1000)
    torch.testing.assert_close(
        plan_TE.sum(1), torch.full((12,), 1 / 12).double(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(plan_TE.sum(0), torch.full((E,), 1 / E).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(plan_TE, balanced_plan(logits_TE + 50, 1e-12, 1000))
    assert balanced_plan(logits_TE * 1000, 1e-4, 100).isfinite().all()  # exp would overflow


@torch.no_grad()
def test_a_skewed_batch_is_spread_out_in_training_and_not_in_evaluation():
    gate, given = build(), rows(400, skew=2.0)
    even, skewed = gate.route(given).counts_E, gate.eval().route(given).counts_E
    assert int(even.max()) < 150 < 200 < int(skewed.max())
    expected = [max(range(E), key=lambda e, a=a: float(a[e])) for a in given.x_TD @ gate.weight.T]
    assert gate.route(given).experts_TK.flatten().tolist() == expected


@torch.no_grad()
def test_rows_that_are_not_valid_do_not_change_the_plan():
    gate = build(k=2)
    given = rows(8, valid=[True, False, True, True, False, True, True, True])
    routing = gate.route(given)
    alone = gate.route(RouterInput(x_TD=given.x_TD[given.valid_T]))
    assert torch.equal(routing.experts_TK[given.valid_T], alone.experts_TK)
    assert (routing.experts_TK[~given.valid_T] == -1).all()


def test_gradients_come_through_the_weights_only():
    gate, given = build(k=2), rows(5)
    routing = gate.route(given)
    mixer = torch.randn(5, 2).double()
    (routing.weights_TK * mixer).sum().backward()
    weight = gate.weight.detach().clone().requires_grad_()
    scores_TE = (given.x_TD @ weight.T).softmax(1)
    (scores_TE.gather(1, routing.experts_TK.long()) * mixer).sum().backward()
    torch.testing.assert_close(gate.weight.grad, weight.grad)
    assert gate.losses(routing, None).terms == ()
