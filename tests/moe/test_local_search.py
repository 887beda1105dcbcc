"""The search for an order of experts around other routers. T tokens, D width, E experts."""

import inspect
import itertools
import math

import pytest
import torch

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.routers.around import AroundRouter
from moeyard.moe.routers.assignment import balanced_assignment, best_assignment, sinkhorn
from moeyard.moe.routers.local_search import LocalSearch
from moeyard.moe.routers.losses import global_counts
from moeyard.moe.routers.nested import inner_counts
from moeyard.moe.routers.router import RouterConfig, RouterSizes
from moeyard.moe.routers.routing import RouterInput

from router_shares import assert_shares_add_up, dense

D, E = 6, 5


def build(inner=None, search_steps=4, seed=0, **fields):
    torch.manual_seed(seed)
    config = moeyard.router(
        "local_search", router=inner or {"kind": "topk"}, search_steps=search_steps, **fields
    )
    return config.build(RouterSizes(D, E, 20)).double()


def rows(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return RouterInput(
        x_TD=torch.randn(total, D, generator=generator, dtype=torch.float64),
        ids_T=torch.randint(0, 20, (total,), generator=generator),
        lengths=lengths,
    )


def soft_by_hand(matrix, temperature, iterations):
    """Sinkhorn on plain numbers, entry by entry."""
    p = [[math.exp(float(value) / temperature) for value in row] for row in matrix]
    for _ in range(iterations):
        p = [[value / sum(row) for value in row] for row in p]
        sums = [sum(row[column] for row in p) for column in range(E)]
        p = [[value / total for value, total in zip(row, sums, strict=True)] for row in p]
    return torch.tensor(p, dtype=torch.float64)


def finish_step(gate, given):
    routing = gate.train().route(given)
    counts = global_counts([routing], lambda own: own)
    gate.after_step(counts[0], counts)


@pytest.mark.parametrize("inner", ["topk", "hash", "comet"])
def test_weights_of_the_search_are_the_inner_ones_times_the_soft_permutation(inner):
    gate = build({"kind": inner, "k": 1}, first_temperature=0.05, first_iterations=3)
    given = rows(4, 3)
    with torch.no_grad():
        soft = soft_by_hand(gate.permutation_weight, 0.05, 3)
        before, routing = gate.router.route(given), gate.route(given)
    assert soft.max() < 0.9  # soft indeed
    weights_TE = dense(routing, E).double()  # a hash router's are in fp32
    torch.testing.assert_close(weights_TE, dense(before, E).double() @ soft, rtol=1e-6, atol=1e-7)
    assert routing.counts_E.tolist() == [7] * E
    logs = [-p * math.log(p + 1e-6) for p in soft.flatten().tolist()]
    even = [-p * math.log(p + 1e-6) for p in (soft / soft.sum(1, keepdim=True)).flatten().tolist()]
    torch.testing.assert_close(
        float(routing.extras["permutation_entropy"].detach()), (sum(logs) + sum(even)) / E
    )


def test_temperature_falls_by_its_logarithm_and_iterations_grow_linearly():
    gate = build(search_steps=5, first_temperature=1.0, last_temperature=1e-4)
    matrix = torch.randn(E, E)
    for step, (temperature, iterations) in enumerate(
        [(1, 20), (1e-1, 52), (1e-2, 85), (1e-3, 118), (1e-4, 150)]
    ):
        expected = sinkhorn(matrix.double() / temperature, iterations)
        torch.testing.assert_close(gate._soften(matrix, step), expected)


def test_a_soft_permutation_becomes_the_nearest_one_and_stays():
    gate, given = build(search_steps=2, first_temperature=0.3, last_temperature=0.1), rows(9)
    gate.permutation_weight.data.copy_(torch.randn(E, E))
    finish_step(gate, given)
    finish_step(gate, given)
    soft = gate._soften(gate.permutation_weight, 1).tolist()
    best = max(
        itertools.permutations(range(E)),
        key=lambda order: sum(soft[row][column] for row, column in enumerate(order)),
    )
    assert tuple(gate.order_E.tolist()) == best != tuple(range(E))
    gate.permutation_weight.data.copy_(torch.randn(E, E))  # nothing reads it any more
    finish_step(gate, given)
    assert tuple(gate.order_E.tolist()) == best
    inner, routing = gate.router.route(given), gate.route(given)
    assert routing.experts_TK.tolist() == [[best[e] for e in row] for row in inner.experts_TK]
    assert torch.equal(routing.weights_TK, inner.weights_TK)
    counts = torch.bincount(routing.experts_TK.flatten(), minlength=E)
    assert torch.equal(routing.counts_E, counts)


def test_evaluation_takes_the_nearest_permutation_from_the_start():
    gate, given = build(first_temperature=0.1), rows(9)
    soft = gate._soften(gate.permutation_weight, 0)
    assert torch.equal(best_assignment(soft), torch.arange(E))  # names are exchanged at first
    inner, routing = gate.eval().router.route(given), gate.route(given)
    assert torch.equal(routing.experts_TK, inner.experts_TK) and not routing.extras
    fresh = gate.initialize("permutation_weight", torch.Generator().manual_seed(3))
    assert torch.equal(best_assignment(gate._soften(fresh, 0)), torch.arange(E))
    assert fresh.abs().max() < 0.05 and fresh.std() > 0.02


def test_gradients_reach_the_matrix_and_the_inner_router_in_the_search_only():
    given, mixer = rows(6), torch.randn(6, E).double()
    gate = build(search_steps=1, first_temperature=0.05)
    (dense(gate.route(given), E) * mixer).sum().backward()
    assert gate.permutation_weight.grad.any() and gate.router.weight.grad.any()
    finish_step(gate, given)
    gate.zero_grad()
    (dense(gate.route(given), E) * mixer).sum().backward()
    assert gate.permutation_weight.grad is None and gate.router.weight.grad.any()


def test_gradients_of_the_matrix_are_those_of_finite_differences():
    matrix = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: sinkhorn(values / 0.5, 4), [matrix])


@pytest.mark.parametrize("inner", ["topk", "comet"])
@pytest.mark.parametrize("steps_done", [0, 1])
def test_shares_of_two_ranks_add_up_to_the_inner_loss_and_the_entropy(inner, steps_done):
    gate, given = build({"kind": inner}, search_steps=1, first_temperature=0.05), rows(4, 2, 5)
    for _ in range(steps_done):
        finish_step(gate, given)
    value, gradients = assert_shares_add_up(gate, given)
    routing = gate.router.route(given)
    inner_loss = sum(
        gate.router.losses(routing, global_counts([routing], lambda own: own)[0]).terms
    )
    entropy = 0 if steps_done else gate.route(given).extras["permutation_entropy"]
    torch.testing.assert_close(value, (inner_loss + 1e-4 * entropy).detach())
    assert gradients["permutation_weight"].any() == (not steps_done)  # DDP waits for it after, too


def test_the_inner_router_sees_its_own_counts():
    gate, given = build({"kind": "topk", "bias_update_rate": 0.1}), rows(9)
    alone = gate.router.route(given).counts_E
    routing = gate.route(given)
    counts = global_counts([routing], lambda own: own)
    assert torch.equal(inner_counts(counts[0]).counts_E, alone)
    gate.after_step(counts[0], counts)
    expected = 0.1 * (alone.double().mean() - alone).sign()
    torch.testing.assert_close(gate.router.e_score_correction_bias, expected)
    assert gate.dropped(counts[0]) == 0


def test_k_is_that_of_the_inner_router_and_searches_do_not_nest():
    assert moeyard.router("local_search", router={"kind": "topk", "k": 3}).k == 3
    with pytest.raises(ConfigError, match="k is 4, but that of the inner router is 3"):
        moeyard.router("local_search", router=moeyard.TopK(k=3), k=4)
    with pytest.raises(ConfigError, match=r"router.router.kind is 'local_search'; use one of"):
        moeyard.router("local_search", router={"kind": "local_search"})
    config = moeyard.router("local_search", router={"kind": "hash"})
    assert config.needs_token_counts and moeyard.router(**config.model_dump()) == config
    with pytest.raises(ConfigError, match=r"router.k is 6, but the layer has 5 experts"):
        build({"kind": "topk", "k": 6})


def test_the_search_passes_on_all_that_a_configuration_says():
    asked = {name for name, value in vars(RouterConfig).items() if inspect.isfunction(value)}
    asked = {name for name in asked if not name.startswith("_")}
    defined = vars(LocalSearch).keys() | vars(AroundRouter).keys()
    assert "why_not_causal" in asked and asked <= defined


def test_an_order_in_a_folder_must_be_a_permutation():
    config = moeyard.router("local_search", router={"kind": "hash"})
    assert config.problem_with_tensor("order_E", torch.tensor([1, 0, 2]), 3) is None
    assert "not an order" in config.problem_with_tensor("order_E", torch.tensor([1, 1, 2]), 3)
    problem = config.problem_with_tensor("router.table_VK", torch.tensor([[0], [9]]), 3)
    assert "experts from 0 to 9" in problem


@pytest.mark.parametrize("num_rows", [0, 2, 3, 6, 7, 8])
def test_a_balanced_assignment_is_the_best_of_all(num_rows):
    scores = torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(num_rows))
    found = balanced_assignment(scores)
    allowed = {num_rows // 3, -(-num_rows // 3)}
    best = max(
        sum(float(scores[row, expert]) for row, expert in enumerate(experts))
        for experts in itertools.product(range(3), repeat=num_rows)
        if {experts.count(expert) for expert in range(3)} <= allowed
    )
    assert set(torch.bincount(found, minlength=3).tolist()) <= allowed
    assert float(scores.gather(1, found.unsqueeze(1)).sum()) == pytest.approx(best, abs=1e-5)
