"""Null experts (AdaMoE, MoE++)."""

import pytest
import torch

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.routers.losses import global_counts
from moeyard.moe.routers.null_experts import NullExperts, NullExpertsRouter
from moeyard.moe.routers.routing import RouterInput

from router_shares import losses_of_ranks

D, E, M = 6, 4, 3
forms = pytest.mark.parametrize("over", ["experts", "all"])


def router(k: int = 2, **options) -> NullExpertsRouter:
    torch.manual_seed(0)
    return NullExpertsRouter(NullExperts(k=k, num_null=M, **options), D, E).double()


def rows(count: int = 15) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, D, generator=generator, dtype=torch.float64)


def probabilities(gate: NullExpertsRouter, x_D: torch.Tensor) -> list[torch.Tensor]:
    exps = [(row @ x_D).exp() for row in gate.weight]
    return [value / sum(exps) for value in exps]


@forms
def test_null_choices_are_none_and_weights_are_renormalized_as_asked(over):
    """In value and in all gradients, against the formula row by row."""
    gate, x_TD = router(k=3, renormalize_over=over), rows().requires_grad_()
    routing = gate.route(RouterInput(x_TD))
    pull_TE = torch.randn(15, E, dtype=torch.float64)
    expected, found = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    nulls = 0
    for token, x_D in enumerate(x_TD):
        scores = probabilities(gate, x_D)
        best = sorted(range(E + M), key=lambda e: -scores[e])[:3]
        assert routing.experts_TK[token].tolist() == [e if e < E else -1 for e in best]
        nulls += sum(e >= E for e in best)
        counted = best if over == "all" else [e for e in best if e < E]
        total = sum(scores[e] for e in counted)
        for place, expert in enumerate(best):
            weight = routing.weights_TK[token, place]
            if expert >= E:
                assert weight == 0
                continue
            torch.testing.assert_close(weight, scores[expert] / total)
            expected = expected + pull_TE[token, expert] * scores[expert] / total
            found = found + pull_TE[token, expert] * weight
    assert nulls == int(routing.extra_counts["null"]) > 0
    assert int(routing.counts_E.sum()) == 15 * 3 - nulls
    leaves = [x_TD, gate.weight]
    for gradient, wanted in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


def layer(**options) -> moeyard.MoELayer:
    torch.manual_seed(0)
    config = NullExperts(num_null=M, **options)
    return moeyard.MoELayer(D, 5, E, config, backend="reference").double()


def test_a_token_with_null_experts_alone_skips_the_layer():
    moe = layer(k=2)
    with torch.no_grad():
        moe.gate.weight[:] = 0
        moe.gate.weight[E:, 0] = 1.0
    x_TD = rows(6)
    x_TD[:, 0] = torch.tensor([9.0, -9, 9, -9, 9, 9])
    x_TD.requires_grad_()
    y_TD, routing = moe(x_TD)
    skips = torch.tensor([True, False, True, False, True, True])
    assert (y_TD[skips] == 0).all() and (y_TD[~skips].abs().amax(1) > 0).all()
    assert routing.counts_E.sum() == 4 and int(routing.extra_counts["null"]) == 8
    assert torch.autograd.grad(y_TD.square().sum(), x_TD)[0][skips].abs().max() == 0


def test_a_batch_that_skips_the_layer_runs_no_expert(monkeypatch):
    moe = layer(k=2)
    with torch.no_grad():
        moe.gate.weight[:] = 0
        moe.gate.weight[E:, 0] = 1.0
    x_TD = rows(5).abs().requires_grad_()
    seen = []
    run = type(moe.experts).forward

    def watched(self, x_ND, experts_NK, weights_NK):
        seen.append(len(x_ND))
        return run(self, x_ND, experts_NK, weights_NK)

    monkeypatch.setattr(type(moe.experts), "forward", watched)
    y_TD, _ = moe(x_TD)
    assert (y_TD == 0).all() and seen == [0]
    loss = y_TD.sum() + moe.auxiliary_loss(moe(x_TD)[1])
    loss.backward()
    assert moe.gate.weight.grad.isfinite().all()


def test_a_partner_of_a_null_expert_weighs_one_or_its_share():
    for over, wanted in (("experts", 1.0), ("all", 0.25)):
        gate = router(k=2, renormalize_over=over)
        with torch.no_grad():
            gate.weight[:] = -9
            gate.weight[2, :] = 0
            gate.weight[E, :] = torch.tensor(3.0).log() / D  # three times as probable
        routing = gate.route(RouterInput(torch.ones(1, D, dtype=torch.float64)))
        assert routing.experts_TK.tolist() == [[-1, 2]]
        torch.testing.assert_close(routing.weights_TK[0, 1].item(), wanted)


@pytest.mark.parametrize("factor", [1.0, 0.75])
def test_the_balance_loss_treats_null_experts_as_one_group(factor):
    """And ranks add up to it, in value and in gradient."""
    gate = router(k=3, balance_loss=0.4, null_factor=factor)
    x_TD = rows()
    counts, sums = [0] * (E + M), [0.0] * (E + M)
    for x_D in x_TD:
        scores = probabilities(gate, x_D)
        for expert in sorted(range(E + M), key=lambda e: -scores[e])[:3]:
            counts[expert] += 1
        sums = [old + new for old, new in zip(sums, scores, strict=True)]
    mean = sum(counts[E:]) / M * factor
    loads = counts[:E] + [mean] * M
    loss = (E + M) / (3 * 15**2) * sum(n * p for n, p in zip(loads, sums, strict=True))
    (right,) = torch.autograd.grad(0.4 * loss, gate.weight)
    for parts in ([x_TD], [x_TD[:6], x_TD[6:]]):
        total = losses_of_ranks(gate, [RouterInput(part) for part in parts])
        torch.testing.assert_close(total, 0.4 * loss, rtol=1e-12, atol=0)
        (found,) = torch.autograd.grad(total, gate.weight)
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


def test_the_balance_loss_is_one_when_all_is_even():
    gate = router(k=1, balance_loss=1.0)
    with torch.no_grad():
        gate.weight.zero_()
    routing = gate.route(RouterInput(rows(14)))
    routing.counts_E = torch.full((E,), 2)
    routing.extra_counts["null"] = torch.tensor(2 * M)
    found = moeyard.auxiliary_loss([layer_of(gate)], [routing])
    assert float(found.detach()) == pytest.approx(1.0)


def layer_of(gate: NullExpertsRouter) -> moeyard.MoELayer:
    moe = moeyard.MoELayer(D, 5, E, gate.config)
    moe.gate = gate
    return moe


def test_a_smaller_factor_sends_more_choices_to_null_experts():
    shares = {}
    for factor in (0.5, 2.0):
        gate = router(k=2, balance_loss=1.0, null_factor=factor)
        optimizer = torch.optim.SGD(gate.parameters(), 1.0)
        for _ in range(100):
            total = losses_of_ranks(gate, [RouterInput(rows(200))])
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        null = gate.route(RouterInput(rows(200))).extra_counts["null"]
        shares[factor] = int(null) / 400
    assert shares[0.5] > shares[2.0] + 0.2


def test_nothing_is_dropped_and_evaluation_has_no_losses():
    gate = router()
    routing = gate.route(RouterInput(rows()))
    counts = global_counts([routing], lambda counts: counts)[0]
    assert gate.dropped(counts) == 0 and int(counts.extra["null"]) > 0
    with pytest.raises(ConfigError, match="keep in training mode only"):
        gate.losses(gate.eval().route(RouterInput(rows())), counts)


def test_it_compiles_to_one_graph():
    gate, x_TD = router().float(), rows().float()
    compiled = torch.compile(
        lambda x: gate.route(RouterInput(x)).weights_TK, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x_TD), gate.route(RouterInput(x_TD)).weights_TK)
