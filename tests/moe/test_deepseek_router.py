"""DeepSeek's routers against their formulas: V3's sigmoid, groups, bias and sequence balance, and
V2's softmax with groups ranked by their best."""

import pytest
import torch

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.routers.loss_terms import GlobalCounts
from moeyard.moe.routers.losses import auxiliary_losses
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.topk import TopK

EXPERTS, GROUPS, KEPT, K = 12, 4, 2, 3


def gate(**options):
    torch.manual_seed(1)
    values = {"k": K, "score": "sigmoid", "num_groups": GROUPS, "top_groups": KEPT, "scale": 2.5}
    values |= {"bias_update_rate": 0.001} | options
    router = TopK(**values).build(RouterSizes(8, EXPERTS)).double()
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias += torch.linspace(-0.4, 0.4, EXPERTS).flip(0)
    return router


def rows(count=40) -> torch.Tensor:
    return torch.randn(count, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def choose_by_formula(router, x_D) -> dict[int, float]:
    """Return expert -> weight of one token."""
    scores = torch.sigmoid(router.weight @ x_D)
    biased = scores + router.e_score_correction_bias
    size = EXPERTS // GROUPS
    groups = [range(g * size, (g + 1) * size) for g in range(GROUPS)]
    judged = sorted(groups, key=lambda g: -sum(sorted(biased[list(g)].tolist())[-2:]))
    allowed = [expert for group in judged[:KEPT] for expert in group]
    chosen = sorted(allowed, key=lambda e: -biased[e])[:K]
    total = sum(float(scores[e]) for e in chosen)
    return {e: 2.5 * float(scores[e]) / total for e in chosen}


def test_chooses_within_the_best_groups_by_biased_score_and_weighs_without_bias():
    router, x = gate(), rows()
    routing = router.route(RouterInput(x))
    for token in range(len(x)):
        expected = choose_by_formula(router, x[token])
        assert routing.experts_TK[token].tolist() == list(expected)
        assert routing.weights_TK[token].tolist() == pytest.approx(list(expected.values()))


@torch.no_grad()
def test_version_2_judges_groups_by_their_best_and_does_not_renormalize():
    options = {"score": "softmax", "group_score": "max", "renormalize": False, "scale": 16.0}
    router, x = gate(bias_update_rate=None, **options), rows()
    routing = router.route(RouterInput(x))
    size, differs = EXPERTS // GROUPS, 0
    for token in range(len(x)):
        scores = torch.softmax(router.weight @ x[token], dim=-1).tolist()
        groups = [range(g * size, (g + 1) * size) for g in range(GROUPS)]
        judged = sorted(groups, key=lambda g: -max(scores[e] for e in g))
        allowed = [expert for group in judged[:KEPT] for expert in group]
        chosen = sorted(allowed, key=lambda e: -scores[e])[:K]
        assert routing.experts_TK[token].tolist() == chosen
        expected = [16.0 * scores[e] for e in chosen]
        assert routing.weights_TK[token].tolist() == pytest.approx(expected)
        by_two = sorted(groups, key=lambda g: -sum(sorted(scores[e] for e in g)[-2:]))
        differs += set(judged[:KEPT]) != set(by_two[:KEPT])
    assert differs, "the two rules must choose different groups in some rows"


def test_the_bias_gets_no_gradient_and_the_weights_do():
    router, x = gate(), rows().requires_grad_()
    router.route(RouterInput(x)).weights_TK.square().sum().backward()
    assert not router.e_score_correction_bias.requires_grad
    assert x.grad.abs().sum() > 0 and router.weight.grad.abs().sum() > 0


def after_step(router, counts_E):
    counts = GlobalCounts(counts_E, torch.tensor(0), {})
    router.after_step(counts, [counts])


def test_the_bias_moves_by_its_rate_towards_even_load():
    router = gate(bias_update_rate=0.01)
    before = router.e_score_correction_bias.clone()
    counts = torch.tensor([5] * 4 + [1] * 4 + [3] * 4)
    after_step(router, counts)
    moved = router.e_score_correction_bias - before
    torch.testing.assert_close(moved, torch.tensor([-0.01] * 4 + [0.01] * 4 + [0.0] * 4).double())


@pytest.mark.parametrize("rate", [None, 0.0])
def test_a_missing_or_frozen_bias_stays(rate):
    router = gate(bias_update_rate=rate)
    before = router.e_score_correction_bias
    before = None if before is None else before.clone()
    after_step(router, torch.arange(EXPERTS))
    assert (before is None) == (router.e_score_correction_bias is None)
    assert before is None or torch.equal(before, router.e_score_correction_bias)


def test_updates_drive_a_skewed_router_to_even_load():
    router = gate(num_groups=1, top_groups=1, bias_update_rate=0.005)
    x = rows(600) + 1.5  # a common direction that favours a few experts

    def peak():
        counts = router.route(RouterInput(x)).counts_E
        return float(counts.max() / counts.double().mean())

    first = peak()
    for _ in range(400):
        after_step(router, router.route(RouterInput(x)).counts_E)
    assert first > 2 and peak() < 1.2


def test_sequence_balance_follows_its_formula_and_adds_up_over_ranks():
    router, x = gate(sequence_balance_loss=0.5, balance_loss=0.0), rows(30)
    lengths = (10, 0, 13, 7)
    valid = torch.ones(30, dtype=torch.bool)
    valid[-3:] = False
    routing = router.route(RouterInput(x, valid_T=valid, lengths=lengths))
    found = auxiliary_losses([routing], [router], reduce=lambda counts: counts)

    probabilities = torch.sigmoid(x @ router.weight.T)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    expected, start = [], 0
    for length in lengths:
        here = [t for t in range(start, start + length) if valid[t]]
        start += length
        if not here:
            continue
        best = torch.sigmoid(x[here] @ router.weight.T).topk(K).indices  # neither bias nor groups
        f_E = torch.bincount(best.flatten(), minlength=EXPERTS) * EXPERTS / (K * len(here))
        expected.append((f_E * probabilities[here].mean(0)).sum())
    torch.testing.assert_close(found.total, 0.5 * torch.stack(expected).mean())

    parts = [(0, 10, (10,)), (10, 30, (0, 13, 7))]
    halves = [router.route(RouterInput(x[a:b], valid_T=valid[a:b], lengths=n)) for a, b, n in parts]
    packed: list[torch.Tensor] = []
    for half in halves:
        auxiliary_losses([half], [router], lambda counts: packed.append(counts) or counts)
    shares = [auxiliary_losses([half], [router], lambda _: sum(packed)) for half in halves]
    torch.testing.assert_close(shares[0].total + shares[1].total, found.total, rtol=1e-12, atol=0)


def test_weights_stay_finite_where_all_scores_vanish():
    router = gate()
    with torch.no_grad():
        router.weight.fill_(-1e4)
    routing = router.route(RouterInput(torch.ones(3, 8, dtype=torch.float64)))
    assert routing.weights_TK.isfinite().all()


def test_a_layer_counts_sequences_by_the_shape_of_its_input():
    layer = moeyard.MoELayer(8, 6, 4, TopK(k=2, sequence_balance_loss=1.0))
    _, routing = layer(torch.randn(3, 5, 8))
    assert int(routing.extra_counts["num_sequences"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 5, "top_groups": 1}, "num_groups is 5, which does not divide"),
        ({"top_groups": 1, "k": 4}, "leave 3 experts; raise top_groups or lower k"),
    ],
    ids=["ragged", "too_few"],
)
def test_groups_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        gate(**options)
