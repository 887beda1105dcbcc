"""Routers: choices, weights, counts, losses."""

import pytest
import torch

from moeyard.errors import ConfigError
from moeyard.moe.routers.hash import Hash, HashRouter
from moeyard.moe.routers.hash_tables import balanced_table, random_table
from moeyard.moe.routers.load import load_statistics
from moeyard.moe.routers.losses import auxiliary_losses
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import Lookahead, RouterInput
from moeyard.moe.routers.topk import TopK, TopKRouter


def router(k=2, experts=5, **options) -> TopKRouter:
    torch.manual_seed(0)
    return TopKRouter(TopK(k=k, **options), 8, experts).double()


def rows(count=11) -> torch.Tensor:
    return torch.randn(count, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("renormalize", [True, False])
def test_top_k_takes_the_most_probable_experts_with_their_probabilities(renormalize):
    gate = router(renormalize=renormalize)
    x = rows()
    routing = gate.route(RouterInput(x))
    probabilities = (x @ gate.weight.T).softmax(-1)
    for token in range(len(x)):
        best = sorted(range(5), key=lambda e: -probabilities[token, e])[:2]
        assert routing.experts_TK[token].tolist() == best
        expected = probabilities[token, best]
        expected = expected / expected.sum() if renormalize else expected
        torch.testing.assert_close(routing.weights_TK[token], expected)


def test_top_k_scores_bf16_rows_in_fp32():
    gate = router().float()
    x = rows().bfloat16()
    routing = gate.route(RouterInput(x))
    assert routing.weights_TK.dtype == torch.float32
    wide = gate.route(RouterInput(x.float()))
    assert torch.equal(routing.experts_TK, wide.experts_TK)


def test_rows_that_are_not_valid_are_neither_routed_nor_counted():
    gate, x = router(), rows()
    valid = torch.tensor([True] * 6 + [False] * 5)
    routing, alone = gate.route(RouterInput(x, valid_T=valid)), gate.route(RouterInput(x[:6]))
    assert (routing.experts_TK[6:] == -1).all()
    assert torch.equal(routing.counts_E, alone.counts_E) and int(routing.num_tokens) == 6
    torch.testing.assert_close(
        routing.extras["probability_sums_E"], alone.extras["probability_sums_E"]
    )
    torch.testing.assert_close(routing.extras["z_sum"], alone.extras["z_sum"])


def test_jitter_acts_in_training_only():
    gate, x = router(jitter=0.5), rows()
    quiet = gate.eval().route(RouterInput(x)).weights_TK
    assert torch.equal(quiet, gate.route(RouterInput(x)).weights_TK)
    assert not torch.equal(quiet, gate.train().route(RouterInput(x)).weights_TK)


def test_losses_follow_their_formulas():
    gate, x = router(balance_loss=0.5, z_loss=0.25), rows()
    routing = gate.route(RouterInput(x))
    found = auxiliary_losses([routing], [gate], reduce=lambda counts: counts)
    logits = x @ gate.weight.T
    share = logits.softmax(-1).topk(2).indices.flatten().bincount(minlength=5).double() / (11 * 2)
    balance = 5 * (share * logits.softmax(-1).mean(0)).sum()
    z = logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(found.balance, balance)
    torch.testing.assert_close(found.z, z)
    torch.testing.assert_close(found.total, 0.5 * balance + 0.25 * z)


def test_balance_loss_is_one_when_all_is_even():
    gate = router(k=1, experts=4, balance_loss=1.0)
    with torch.no_grad():
        gate.weight.zero_()
    routing = gate.route(RouterInput(rows(8)))
    routing.counts_E = torch.tensor([2, 2, 2, 2])
    found = auxiliary_losses([routing], [gate], reduce=lambda counts: counts)
    assert float(found.balance) == pytest.approx(1.0)


def test_shares_of_two_ranks_add_up_to_the_loss_of_one():
    """The injected reduction sees counts only; values and gradients still sum exactly."""
    gate, x = router(balance_loss=0.7, z_loss=0.1), rows(12)
    whole = auxiliary_losses([gate.route(RouterInput(x))], [gate], lambda c: c)
    expected = torch.autograd.grad(whole.total, gate.weight)[0]
    halves = [gate.route(RouterInput(part)) for part in (x[:5], x[5:])]
    packed = []
    for routing in halves:
        auxiliary_losses([routing], [gate], lambda counts: packed.append(counts) or counts)
    shares = [auxiliary_losses([r], [gate], lambda _: sum(packed)) for r in halves]
    total = shares[0].total + shares[1].total
    torch.testing.assert_close(total, whole.total, rtol=1e-13, atol=0)
    actual = torch.autograd.grad(total, gate.weight)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


def test_hash_routes_by_token_id_alone_with_equal_weights():
    gate = HashRouter(Hash(k=2, table="random", seed=1), 6, vocab_size=50)
    assert gate.lookahead is Lookahead.TOKEN
    ids = torch.tensor([3, 7, 3, 49])
    routing = gate.route(RouterInput(ids_T=ids))
    assert torch.equal(routing.experts_TK, gate.table_VK[ids])
    assert (routing.weights_TK == 0.5).all()
    with pytest.raises(ConfigError, match="pass token_ids"):
        gate.route(RouterInput(rows()))


def test_random_table_names_distinct_experts_and_depends_on_the_seed():
    table = random_table(200, 6, 3, seed=5)
    assert all(len(set(row)) == 3 for row in table.tolist())
    assert torch.equal(table, random_table(200, 6, 3, seed=5))
    assert not torch.equal(table, random_table(200, 6, 3, seed=6))


@pytest.mark.parametrize("k", [1, 2])
def test_balanced_table_evens_out_traffic_that_random_does_not(k):
    counts = [int(10_000 / (rank + 1)) for rank in range(300)]

    def loads(table):
        return torch.zeros(8).index_add_(
            0, table.flatten().long(), torch.tensor(counts).float().repeat_interleave(k)
        )

    balanced, random = loads(balanced_table(counts, 8, k)), loads(random_table(300, 8, k, seed=0))
    assert balanced.max() / balanced.mean() < random.max() / random.mean()
    # No table can be better than the load of the most frequent token.
    assert balanced.max() <= max(max(counts), 1.02 * float(balanced.mean()))


def test_more_choices_than_experts_is_refused():
    with pytest.raises(ConfigError, match=r"router\.k is 7, but the layer has 5 experts"):
        TopK(k=7).build(RouterSizes(8, 5))


def test_load_statistics_of_known_counts():
    even = load_statistics(torch.tensor([4, 4, 4, 4]))
    assert (even.max_over_mean, even.cv, even.idle, even.dropped) == (1.0, 0.0, 0, 0)
    assert even.entropy == pytest.approx(1.3862943611)
    skewed = load_statistics(torch.tensor([8, 0, 0, 0]), dropped=2)
    assert (skewed.max_over_mean, skewed.max_violation, skewed.idle) == (4.0, 3.0, 3)
    assert skewed.cv == pytest.approx(3**0.5) and skewed.entropy == 0 and skewed.dropped == 2
    assert load_statistics(torch.zeros(3)).idle == 3
