"""Expert choice and mutual choice: exact budgets, and thresholds for single tokens.

T tokens, D width, E experts.
"""

import dataclasses

import pytest
import torch

import moeyard
from moeyard.moe.routers.losses import global_counts
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.whole_batch import from_fixed_point

from router_shares import dense, part_of

D, E = 6, 5


def build(**fields):
    torch.manual_seed(0)
    return moeyard.router("expert_choice", **fields).build(RouterSizes(D, E)).double()


def rows(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(sum(lengths), D, generator=generator, dtype=torch.float64)
    return RouterInput(x_TD=x_TD, lengths=lengths)


def scores_of(gate, x_TD):
    logits_TE = (x_TD @ gate.weight.T).detach()
    if gate.config.score == "sigmoid":
        return logits_TE.sigmoid()
    return logits_TE.exp() / logits_TE.exp().sum(1, keepdim=True)


def finish_step(gate, parts):
    routings = [gate.train().route(part) for part in parts]
    counts = [global_counts([routing], lambda own: own)[0] for routing in routings]
    whole = counts[0]
    for more in counts[1:]:
        whole = whole.plus(more)
    gate.after_step(whole, [whole])
    return whole


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_each_expert_takes_its_best_tokens_of_each_sequence(score):
    gate, given = build(k=2, score=score), rows(7, 4)
    expected, smallest = torch.zeros(11, E, dtype=torch.float64), [0.0] * E
    for first, length, capacity in ((0, 7, 3), (7, 4, 2)):  # ceil(2 * 7 / 5), ceil(2 * 4 / 5)
        scores_TE = scores_of(gate, given.x_TD[first : first + length])
        for expert in range(E):
            order = sorted(range(length), key=lambda t, e=expert: -float(scores_TE[t, e]))
            for token in order[:capacity]:
                expected[first + token, expert] = scores_TE[token, expert]
            smallest[expert] += float(scores_TE[order[capacity - 1], expert])
    routing = gate.route(given)
    torch.testing.assert_close(dense(routing, E).detach(), expected)
    assert routing.counts_E.tolist() == [5] * E
    sums_E = from_fixed_point(routing.extra_counts["smallest"], torch.float64)
    torch.testing.assert_close(sums_E, torch.tensor(smallest, dtype=torch.float64))
    assert int(routing.extra_counts["num_groups"]) == 2


def test_mutual_choice_takes_the_largest_scores_of_each_sequence():
    gate, given = build(k=2, choice="mutual", score="sigmoid"), rows(7, 4)
    routing = gate.route(given)
    weights_TE = dense(routing, E).detach()
    for first, length in ((0, 7), (7, 4)):
        scores_TE = scores_of(gate, given.x_TD[first : first + length])
        best = sorted(scores_TE.flatten().tolist(), reverse=True)[: 2 * length]
        kept = torch.where(scores_TE >= best[-1], scores_TE, 0)
        torch.testing.assert_close(weights_TE[first : first + length], kept)
    per_token = (weights_TE > 0).sum(1)
    assert int(per_token.sum()) == 22 and per_token.unique().numel() > 1


def test_ties_go_to_earlier_tokens():
    gate, given = build(k=1), rows(10)
    gate.weight.data.zero_()
    assert dense(gate.route(given), E)[:2].all() and not dense(gate.route(given), E)[2:].any()
    gate = build(k=1, choice="mutual")
    gate.weight.data.zero_()
    assert dense(gate.route(given), E)[:2].all() and not dense(gate.route(given), E)[2:].any()


@pytest.mark.parametrize("choice", ["expert", "mutual"])
def test_rows_that_are_not_valid_take_no_place(choice):
    gate, given = build(choice=choice), rows(6)
    valid_T = torch.tensor([True, False, True, True, True, False])
    routing = gate.route(dataclasses.replace(given, valid_T=valid_T))
    alone = gate.route(RouterInput(x_TD=given.x_TD[valid_T]))
    assert torch.equal(dense(routing, E)[valid_T], dense(alone, E))
    assert torch.equal(routing.extra_counts["smallest"], alone.extra_counts["smallest"])


@pytest.mark.parametrize("choice", ["expert", "mutual"])
def test_thresholds_follow_the_smallest_chosen_scores_of_all_ranks(choice):
    gate, given = build(choice=choice, threshold_rate=0.25), rows(7, 4, 9)
    first = finish_step(gate, [given])
    means = from_fixed_point(first.extra["smallest"], torch.float64) / 3
    torch.testing.assert_close(gate.threshold, means)  # the first step sets them
    later = finish_step(gate, [rows(5, 8, seed=2)])
    more = from_fixed_point(later.extra["smallest"], torch.float64) / 2
    torch.testing.assert_close(gate.threshold, 0.75 * means + 0.25 * more)
    ranks = build(choice=choice, threshold_rate=0.25)
    nothing = part_of(given, 0, 0)
    split = finish_step(ranks, [part_of(given, 0, 1), nothing, part_of(given, 1, 3)])
    torch.testing.assert_close(ranks.threshold, means)
    assert torch.equal(split.extra["smallest"], first.extra["smallest"])
    before = ranks.threshold.clone()
    finish_step(ranks, [nothing])  # a step without tokens
    assert torch.equal(ranks.threshold, before)


@pytest.mark.parametrize("choice", ["expert", "mutual"])
def test_thresholds_keep_the_budget_on_other_tokens(choice):
    gate = build(choice=choice, threshold_rate=0.05)
    for step in range(40):
        finish_step(gate, [rows(*[128] * 4, seed=10 + step)])
    routing = gate.eval().route(rows(20_000, seed=9))
    assert int(routing.counts_E.sum()) == pytest.approx(2 * 20_000, rel=0.05)
    if choice == "expert":
        assert int(routing.counts_E.max()) < 1.1 * 2 * 20_000 / E


@torch.no_grad()
def test_evaluation_looks_at_each_token_alone():
    gate, given = build().eval(), rows(9)
    gate.threshold.uniform_(0.1, 0.3)
    together = dense(gate.route(given), E)
    for token in range(9):
        alone = dense(gate.route(RouterInput(x_TD=given.x_TD[token : token + 1])), E)
        torch.testing.assert_close(alone[0], together[token])
    scores_TE = scores_of(gate, given.x_TD)
    torch.testing.assert_close(together, torch.where(scores_TE > gate.threshold, scores_TE, 0))


def test_evaluation_of_groups_is_that_of_training_and_refuses_to_continue_a_text():
    gate, given = build(evaluation="group"), rows(7, 4)
    chosen = dense(gate.route(given), E)
    assert torch.equal(dense(gate.eval().route(given), E), chosen)
    assert "train with router.evaluation=threshold" in gate.config.why_not_causal()
    assert build().config.why_not_causal() is None


def test_gradients_come_through_the_chosen_scores_only():
    gate, given = build(), rows(8)
    routing = gate.route(given)
    mixer = torch.randn(8, E).double()
    (dense(routing, E) * mixer).sum().backward()
    weight = gate.weight.detach().clone().requires_grad_()
    scores_TE = (given.x_TD @ weight.T).softmax(1)
    (scores_TE * mixer * (dense(routing, E) > 0)).sum().backward()
    torch.testing.assert_close(gate.weight.grad, weight.grad)
    assert gate.losses(routing, None).terms == ()


@pytest.mark.parametrize("choice", ["expert", "mutual"])
def test_rounding_does_not_tell_the_rows_of_a_repeated_token_apart(choice):
    gate, given = build(choice=choice, k=1), rows(4)
    x_TD = given.x_TD.repeat_interleave(torch.tensor([5, 3, 4, 7]), dim=0)
    expected = dense(gate.route(RouterInput(x_TD=x_TD)), E) > 0
    for seed in range(5):
        noise_TD = torch.randn(19, D, generator=torch.Generator().manual_seed(seed)) * 1e-14
        chosen = dense(gate.route(RouterInput(x_TD=x_TD + noise_TD)), E) > 0
        assert torch.equal(chosen, expected)
