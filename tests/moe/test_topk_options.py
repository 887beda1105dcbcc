"""The top-k router with a bias on softmax scores (ERNIE 4.5), an entropy loss, and a capacity."""

import math

import pytest
import torch

import moeyard
from moeyard.moe.routers.loss_terms import GlobalCounts
from moeyard.moe.routers.losses import auxiliary_losses
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.topk import TopK, TopKRouter

D, E = 8, 6


def router(**options) -> TopKRouter:
    torch.manual_seed(1)
    values = {"k": 2, "balance_loss": 0.0} | options
    return TopK(**values).build(RouterSizes(D, E)).double()


def rows(count=40) -> torch.Tensor:
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def total(routing, gate, reduce=lambda counts: counts):
    return auxiliary_losses([routing], [gate], reduce).total


def softmax(x_D, weight_ED) -> list[float]:
    exponentials = [math.exp(float(x_D @ weight_D)) for weight_D in weight_ED]
    return [value / sum(exponentials) for value in exponentials]


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_a_bias_on_softmax_scores_moves_the_choice_and_not_the_weights(training):
    gate, x = router(bias_update_rate=0.01, k=3).train(training), rows()
    gate.e_score_correction_bias += torch.linspace(0.2, -0.2, E)
    routing, moved = gate.route(RouterInput(x)), 0
    for token in range(len(x)):
        scores = softmax(x[token], gate.weight)
        biased = [s + float(b) for s, b in zip(scores, gate.e_score_correction_bias, strict=True)]
        chosen = sorted(range(E), key=lambda e, biased=biased: -biased[e])[:3]
        moved += set(chosen) != set(sorted(range(E), key=lambda e, s=scores: -s[e])[:3])
        assert routing.experts_TK[token].tolist() == chosen
        expected = [scores[e] / sum(scores[e] for e in chosen) for e in chosen]
        assert routing.weights_TK[token].tolist() == pytest.approx(expected)
    assert moved


def test_a_bias_on_softmax_scores_evens_the_load():
    gate, x = router(bias_update_rate=0.01), rows(400) + 0.5
    spread = []
    for _ in range(60):
        with torch.no_grad():
            routing = gate.route(RouterInput(x))
        spread.append(float(routing.counts_E.double().std()))
        counts = GlobalCounts(routing.counts_E, routing.num_tokens, {})
        gate.after_step(counts, [counts])
    assert spread[-1] < 0.2 * spread[0]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_entropy_loss_is_the_mean_entropy_with_its_gradient(score):
    gate, x = router(score=score, entropy_loss=0.5), rows(9)
    expected = 0
    for token in range(9):
        logits = [x[token] @ weight_D for weight_D in gate.weight]
        if score == "softmax":
            scores = [logit.exp() for logit in logits]
        else:
            scores = [1 / (1 + (-logit).exp()) for logit in logits]
        shares = [value / sum(scores) for value in scores]
        expected = expected - 0.5 / 9 * sum(share * share.log() for share in shares)
    found = total(gate.route(RouterInput(x)), gate)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, gate.weight)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


def test_the_entropy_of_scores_that_underflow_is_zero_with_a_finite_gradient():
    gate = router(entropy_loss=1.0).float()
    with torch.no_grad():
        gate.weight[0] = 1000
        gate.weight[1:] = -1000
    loss = total(gate.route(RouterInput(torch.ones(3, D))), gate)
    assert float(loss.detach()) == 0
    assert torch.autograd.grad(loss, gate.weight)[0].isfinite().all()


def test_losses_and_bias_count_choices_before_drops_and_shares_of_ranks_add_up():
    options = {"balance_loss": 1.0, "z_loss": 0.1, "entropy_loss": 0.2, "bias_update_rate": 0.1}
    free, gate = router(**options), router(**options, capacity={"factor": 0.6})
    given = RouterInput(rows(12), lengths=(5, 7))
    plain, limited = free.route(given), gate.route(given)
    assert torch.equal(total(plain, free), total(limited, gate))
    assert 0 < int(limited.extra_counts["dropped"]) == 24 - int(limited.counts_E.sum())
    parts = [gate.route(RouterInput(x)) for x in given.x_TD.split([5, 7])]
    packed = []
    for routing in parts:
        total(routing, gate, lambda counts: packed.append(counts) or counts)
    shares = [total(routing, gate, lambda _: sum(packed)) for routing in parts]
    torch.testing.assert_close(sum(shares), total(limited, gate), rtol=1e-12, atol=0)
    for one, routing in ((free, plain), (gate, limited)):
        counts = GlobalCounts(routing.counts_E, routing.num_tokens, routing.extra_counts)
        one.after_step(counts, [counts])
    assert torch.equal(free.e_score_correction_bias, gate.e_score_correction_bias)
    assert gate.e_score_correction_bias.any()


def test_rounding_and_capacity_exclude_each_other():
    with pytest.raises(moeyard.MoeyardError, match="round_rows_to is 8, but there is a capacity"):
        moeyard.router("topk", round_rows_to=8, capacity={})
