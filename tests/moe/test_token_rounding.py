"""Token rounding: the rows that each expert drops and takes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.token_rounding import EXTRA_CHOICES, round_tokens
from moeyard.moe.routers.topk import TopK, TopKRouter

SIZES = [(300, 2, 8, 16), (300, 2, 8, 7), (64, 4, 6, 32), (500, 1, 3, 128), (40, 2, 8, 128)]


def problem(tokens, choices, experts, seed=0, with_none=True):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=g) + torch.linspace(0, 1, experts)
    scores = logits.double().softmax(dim=-1)
    weights, ids = scores.topk(choices, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    if with_none:
        ids = torch.where((torch.arange(tokens) % 11 == 3).unsqueeze(1), -1, ids)
    return ids.int(), weights, scores


def counts(ids, experts):
    return torch.bincount(ids.flatten().long() + 1, minlength=experts + 1)[1:]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_expert_gets_a_multiple_of_the_tile_near_its_count(size, seed):
    *shape, tile = size
    ids, weights, scores = problem(*shape, seed)
    found, found_weights = round_tokens(ids, weights, scores, tile)
    before, after = counts(ids, shape[2]), counts(found, shape[2])
    assert (after % tile == 0).all()
    assert ((after - before).abs() < tile).all() and (after <= before + tile // 2).all()
    assert found.shape == found_weights.shape == (shape[0], shape[1] + EXTRA_CHOICES)
    assert found.dtype == ids.dtype and not found_weights[found < 0].any()
    assert (found[ids[:, 0] < 0] == -1).all()
    for row in found.tolist():
        named = [expert for expert in row if expert >= 0]
        assert len(set(named)) == len(named)


@pytest.mark.parametrize("seed", range(5))
def test_drops_the_weakest_choices_and_adds_the_best_of_the_others(seed):
    ids, weights, scores = problem(300, 2, 8, seed)
    found, _ = round_tokens(ids, weights, scores, 32)
    kinds = set()
    for expert in range(8):
        chosen = (ids == expert).any(dim=1)
        kept = (found == expert).any(dim=1)
        weight = torch.where(ids == expert, weights, 0).sum(dim=1)
        if (chosen & ~kept).any():
            kinds.add("drops")
            assert not (kept & ~chosen).any()
            assert weight[chosen & ~kept].max() <= weight[chosen & kept].min()
        elif (kept & ~chosen).any():
            kinds.add("adds")
            free = ~kept & ~chosen & (ids[:, 0] >= 0)
            assert scores[kept & ~chosen, expert].min() >= scores[free, expert].max()
    assert kinds == {"drops", "adds"}


def test_goes_to_the_nearest_multiple_where_there_is_room():
    ids, weights, scores = problem(4000, 2, 8)
    before, after = counts(ids, 8), counts(round_tokens(ids, weights, scores, 16)[0], 8)
    assert torch.equal(after, (before + 8) // 16 * 16)


def test_changes_nothing_where_all_counts_are_multiples():
    ids = torch.arange(64).view(32, 2) % 4
    scores = torch.rand(32, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(32, 2, generator=torch.Generator().manual_seed(1))
    found, found_weights = round_tokens(ids, weights, scores, 16)
    assert torch.equal(found[:, :2], ids) and torch.equal(found_weights[:, :2], weights)
    assert (found[:, 2:] == -1).all() and not found_weights[:, 2:].any()


def test_an_expert_whose_token_has_no_place_left_gives_rows_up():
    """Three experts with three rows each want the same token for their fourth; two get it."""
    ids = torch.tensor([[0]] * 3 + [[1]] * 3 + [[2]] * 3 + [[3]] * 4)
    scores = torch.full((13, 4), 0.01)
    scores[12] = torch.tensor([0.3, 0.2, 0.1, 0.4])
    weights = torch.arange(1.0, 14.0).unsqueeze(1)
    found, _ = round_tokens(ids, weights, scores, 4)
    assert counts(found, 4).tolist() == [4, 4, 0, 4]
    assert found[12].tolist() == [3, 0, 1]


def test_what_is_added_weighs_as_the_chosen_do_and_carries_gradients():
    ids, _, scores = problem(300, 2, 8)
    scores = scores.requires_grad_()
    weights = scores.gather(1, ids.clamp(min=0).long())
    weights = 2.5 * weights / weights.sum(dim=1, keepdim=True)
    found, found_weights = round_tokens(ids, weights, scores, 32)
    added = found[:, 2:] >= 0
    total = scores.gather(1, ids.clamp(min=0).long()).sum(dim=1, keepdim=True)
    expected = 2.5 * scores.gather(1, found[:, 2:].clamp(min=0).long()) / total
    assert added.any()
    torch.testing.assert_close(found_weights[:, 2:][added], expected[added])
    (grad,) = torch.autograd.grad(found_weights[:, 2:].sum(), scores)
    (wanted,) = torch.autograd.grad(expected[added].sum(), scores)
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_takes_few_tokens(tokens):
    ids, weights, scores = problem(tokens, 2, 8, with_none=False)
    found, _ = round_tokens(ids, weights, scores, 128)
    assert found.shape == (tokens, 4) and (found == -1).all()
    whole, _ = round_tokens(ids, weights, scores, 1)
    assert torch.equal(whole[:, :2], ids)


def test_asks_nothing_of_the_host():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(part) for part in problem(300, 2, 8)]
        assert round_tokens(*fakes, 16)[0].shape == (300, 4)


def test_a_router_rounds_in_training_alone_and_counts_its_own_choice():
    torch.manual_seed(0)
    plain, rounding = (TopKRouter(TopK(k=2, round_rows_to=n), 16, 6) for n in (0, 32))
    rounding.load_state_dict(plain.state_dict())
    rows = RouterInput(x_TD=torch.randn(200, 16), valid_T=torch.arange(200) < 190)
    expected, found = plain.route(rows), rounding.route(rows)
    assert (counts(found.experts_TK, 6) % 32 == 0).all()
    assert torch.equal(found.counts_E, expected.counts_E)
    torch.testing.assert_close(
        found.extras["probability_sums_E"], expected.extras["probability_sums_E"]
    )
    assert (found.experts_TK[190:] == -1).all()
    found.weights_TK.sum().backward()
    assert rounding.weight.grad.any()
    rounding.eval()
    assert torch.equal(rounding.route(rows).experts_TK, expected.experts_TK)
