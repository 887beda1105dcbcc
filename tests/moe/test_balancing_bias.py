"""Quantile balancing: a bias with which each expert gets its share, from counts over all ranks."""

import pytest
import torch

import moeyard
from moeyard.moe.routers.loss_terms import GlobalCounts
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.topk import TopK, TopKRouter

D, E = 8, 6
OPTIONS = {"bias_update": "quantile", "bias_update_rate": 1.0, "balance_loss": 0.0}


def router(**options) -> TopKRouter:
    torch.manual_seed(1)
    gate = TopK(**({"k": 2} | OPTIONS | options)).build(RouterSizes(D, E)).double()
    gate.e_score_correction_bias += torch.linspace(-0.1, 0.1, E)
    return gate


def rows(count=600, seed=4) -> torch.Tensor:
    """Rows that lean to some experts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, dtype=torch.float64, generator=generator) + 0.7


@torch.no_grad()
def step(gate, x, valid_T=None) -> torch.Tensor:
    routing = gate.route(RouterInput(x, valid_T=valid_T))
    counts = GlobalCounts(routing.counts_E, routing.num_tokens, routing.extra_counts)
    gate.after_step(counts, [counts])
    return routing.counts_E


@torch.no_grad()
def margins(gate, x) -> list[list[float]]:
    """By expert: scores less the third best score with bias, largest first."""
    found: list[list[float]] = [[] for _ in range(E)]
    for x_D in x:
        logits = gate.weight @ x_D
        scores = logits.sigmoid() if gate.config.score == "sigmoid" else logits.softmax(-1)
        rival = sorted((scores + gate.e_score_correction_bias).tolist(), reverse=True)[gate.k]
        for expert in range(E):
            found[expert].append(float(scores[expert]) - rival)
    return [sorted(values, reverse=True) for values in found]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_new_bias_is_the_quantile_of_the_margins(score):
    gate, x = router(score=score), rows()
    expected = margins(gate, x)
    step(gate, x)
    for expert in range(E):
        share = len(x) * gate.k // E
        # Within a bin's width of the value between the last that is in and the first that is out.
        low, high = expected[expert][share], expected[expert][share - 1]
        width = 3 * max(abs(low), abs(high)) ** (2 / 3) * 2 / 512 + 1e-6
        assert low - width <= -float(gate.e_score_correction_bias[expert]) <= high + width


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_few_steps_even_a_load_that_was_far_from_even(score):
    gate, spread = router(score=score), []
    gate.e_score_correction_bias.zero_()
    for number in range(12):
        spread.append(float(step(gate, rows(seed=number)).double().std() / 200))
    assert spread[0] > 0.3
    assert sum(spread[-4:]) / 4 < 0.12  # other rows in every step: about 0.05 by chance alone


def test_the_rate_is_the_part_of_its_way_that_the_bias_moves():
    before = router().e_score_correction_bias.clone()
    whole, half = router(), router(bias_update_rate=0.25)
    for gate in (whole, half):
        step(gate, rows())
    expected = before + 0.25 * (whole.e_score_correction_bias - before)
    torch.testing.assert_close(half.e_score_correction_bias, expected)


def test_ranks_and_micro_batches_add_their_counts():
    gate, x = router(), rows(90)
    with torch.no_grad():
        whole = gate.route(RouterInput(x)).extra_counts["margins_EB"]
        parts = [
            gate.route(RouterInput(part)).extra_counts["margins_EB"] for part in x.split([31, 59])
        ]
    assert torch.equal(sum(parts), whole) and (whole.sum(dim=1) == 90).all()


def test_rows_that_are_not_valid_do_not_count_and_an_empty_step_moves_nothing():
    masked, alone = router(), router()
    x, valid_T = rows(50), torch.arange(50) % 3 != 0
    step(masked, x, valid_T)
    step(alone, x[valid_T])
    assert torch.equal(masked.e_score_correction_bias, alone.e_score_correction_bias)
    before = masked.e_score_correction_bias.clone()
    step(masked, x, torch.zeros(50, dtype=torch.bool))
    assert torch.equal(masked.e_score_correction_bias, before)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bias_update_rate": None}, "bias_update_rate is None; use a value from 0 to 1"),
        ({"bias_update_rate": 1.5}, "bias_update_rate is 1.5; use a value from 0 to 1"),
        ({"num_groups": 2, "top_groups": 2}, "num_groups is 2; use num_groups: 1"),
        ({"k": E}, "router.k is 6, all experts of the layer; lower k"),
    ],
)
def test_what_cannot_be_balanced_by_quantiles_gets_a_sentence(options, sentence):
    with pytest.raises(moeyard.MoeyardError, match=sentence):
        moeyard.router("topk", **(OPTIONS | options)).build(RouterSizes(D, E))
