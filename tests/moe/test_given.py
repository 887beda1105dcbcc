"""Recorded choices with empty places: what fills them, and the weights of routers around them."""

import math
from dataclasses import replace

import pytest
import torch

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.routers.given import fill_places
from moeyard.moe.routers.routing import RouterInput

T, D, E = 17, 8, 6


def gate_of(kind, **fields):
    torch.manual_seed(3)
    return moeyard.router(kind, **fields).build(moeyard.RouterSizes(D, E)).double().train()


def rows(seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(T, D, generator=generator, dtype=torch.float64)
    return RouterInput(x_TD=x_TD, lengths=(9, 8), draw_keys=(5, 6))


def given_experts(width, seed=2):
    """Different experts in each row, with some empty places; one row has none."""
    generator = torch.Generator().manual_seed(seed)
    given_TK = torch.rand(T, E, generator=generator).topk(width).indices.int()
    given_TK[torch.rand(T, width, generator=generator) < 0.4] = -1
    given_TK[4] = -1
    return given_TK


@pytest.mark.parametrize(("width", "candidates", "k"), [(3, 3, 3), (4, 2, 3), (2, 5, 2), (3, 3, 0)])
def test_empty_places_take_candidates_in_order_until_there_are_k(width, candidates, k):
    given_TK = given_experts(width)
    generator = torch.Generator().manual_seed(9)
    candidates_TC = torch.rand(T, E, generator=generator).topk(candidates).indices.int()
    candidates_TC[7] = -1
    found_TK = fill_places(given_TK, candidates_TC, k)
    for given, own, found in zip(given_TK, candidates_TC, found_TK, strict=True):
        rest = [e for e in own.tolist() if e >= 0 and e not in given.tolist()]
        expected = given.tolist()
        for place in range(width):
            if expected[place] < 0 and rest and sum(e >= 0 for e in expected) < k:
                expected[place] = rest.pop(0)
        assert found.tolist() == expected


def expected_weights(kind, logits, given, fields):
    """The weights of one row's given experts, from a list of its logits."""
    scores = [1 / (1 + math.exp(-z)) for z in logits]
    if kind not in ("base", "mutual") and not (kind == "sinkhorn" and fields.get("k", 1) == 1):
        scores = [math.exp(z) / sum(math.exp(y) for y in logits) for z in logits]
    present = [e for e in given if e >= 0]
    total = 1.0
    if kind in ("topk", "noisy"):  # dropped choices are the best of the others
        missing = max(0, fields["k"] - len(present))
        rest = sorted((scores[e] for e in range(E) if e not in present), reverse=True)
        total = sum(scores[e] for e in present) + sum(rest[:missing])
    elif kind == "null_experts":
        total = sum(scores[e] for e in present)
        if fields.get("renormalize_over") == "all":
            total += sum(sorted(scores[E:], reverse=True)[: max(0, fields["k"] - len(present))])
    return [scores[e] / total if e >= 0 else 0.0 for e in given]


TIGHT = {"factor": 0.5}
KINDS = [
    ("base", {}),
    ("sinkhorn", {}),
    ("sinkhorn", {"k": 2}),
    ("expert_choice", {"k": 2}),
    ("topk", {"k": 2, "capacity": TIGHT}),
    ("noisy", {"k": 3, "noise": "none", "load_loss": 0, "capacity": TIGHT}),
    ("null_experts", {"k": 3, "num_null": 3}),
    ("null_experts", {"k": 3, "num_null": 2, "renormalize_over": "all"}),
]


@pytest.mark.parametrize(("kind", "fields"), KINDS, ids=str)
def test_weights_are_the_routers_own_at_any_experts_with_gradient(kind, fields):
    gate, given, given_TK = gate_of(kind, **fields), rows(), given_experts(3)
    routing = gate.route_to(given, given_TK)
    assert torch.equal(routing.experts_TK, given_TK)
    assert torch.equal(routing.counts_E, torch.bincount(given_TK[given_TK >= 0], minlength=E))
    logits_TE = (given.x_TD @ gate.weight.T).tolist()
    expected = [
        expected_weights(kind, logits, ids, fields)
        for logits, ids in zip(logits_TE, given_TK.tolist(), strict=True)
    ]
    present_TK = given_TK >= 0
    expected_TK = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(routing.weights_TK[present_TK], expected_TK[present_TK])
    routing.weights_TK[present_TK].square().sum().backward()
    assert gate.weight.grad.abs().max() > 0


def test_a_null_expert_is_counted_for_each_choice_that_was_none():
    gate, given_TK = gate_of("null_experts", k=3, num_null=3), given_experts(3)
    expected = int((given_TK < 0).sum())
    assert int(gate.route_to(rows(), given_TK).extra_counts["null"]) == expected
    narrow = gate.route_to(rows(), given_TK[:, :2])
    assert int(narrow.extra_counts["null"]) == T * 3 - int((given_TK[:, :2] >= 0).sum())


def test_noise_is_that_of_the_step_and_losses_look_at_the_routers_own_choice():
    gate, given_TK = gate_of("noisy", k=2), given_experts(2)
    gate.noise_weight.data.normal_(generator=torch.Generator().manual_seed(0))
    own, other = gate.route(rows()), gate.route_to(rows(), given_TK)
    assert torch.equal(own.extras["load_E"], other.extras["load_E"])
    gate.step += 1
    assert not torch.equal(gate.route_to(rows(), given_TK).weights_TK, other.weights_TK)


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("second", ["all", "none", "threshold", "random"])
def test_noisy_choices_of_evaluation_replay_with_the_same_bits(second):
    gate = gate_of("noisy", k=2, second_expert=second, second_threshold=0.3, capacity=TIGHT)
    given = rows()
    for dtype in (torch.float32, torch.float64):  # the C++ kernel, and torch
        gate, given = gate.to(dtype).eval(), replace(given, x_TD=given.x_TD.to(dtype))
        own = gate.route(given)
        again = gate.route_to(given, own.experts_TK)
        assert torch.equal(own.experts_TK, again.experts_TK)
        assert torch.equal(own.weights_TK, again.weights_TK)


@pytest.mark.parametrize("choice", ["expert", "mutual"])
def test_thresholds_of_expert_choice_follow_the_routers_own_choice(choice):
    gate = gate_of("expert_choice", choice=choice)
    own, other = gate.route(rows()), gate.route_to(rows(), given_experts(3))
    for name in ("smallest", "num_groups"):
        assert torch.equal(own.extra_counts[name], other.extra_counts[name])


def test_a_search_replays_once_it_is_over_by_the_places_of_the_inner_router():
    gate = gate_of("local_search", search_steps=2, router={"kind": "topk", "k": 2})
    gate.order_E.copy_(torch.tensor([2, 4, 0, 5, 1, 3]))
    given, given_TK = rows(), given_experts(2)
    with pytest.raises(ConfigError) as caught:
        gate.route_to(given, given_TK)
    assert str(caught.value) == (
        "router.search_steps is 2 and 0 are done, but during the search routers cannot replay "
        "recorded routes; replay later steps."
    )
    places = {expert: place for place, expert in enumerate(gate.order_E.tolist())}
    inner_TK = torch.tensor([[places.get(e, -1) for e in row] for row in given_TK.tolist()])
    for gate.training, steps in ((False, 0), (True, 2)):
        gate.router.train(gate.training)
        gate.step.fill_(steps)
        routing, inner = gate.route_to(given, given_TK), gate.router.route_to(given, inner_TK)
        assert torch.equal(routing.experts_TK, given_TK)
        assert torch.equal(routing.weights_TK, inner.weights_TK)
        assert torch.equal(routing.counts_E, torch.bincount(given_TK[given_TK >= 0], minlength=E))


@pytest.mark.parametrize("bad", [E, -2])
@pytest.mark.parametrize("kind", ["base", "local_search", "hash", "expert_choice"])
def test_an_expert_that_does_not_exist_gets_a_sentence(kind, bad):
    sizes = moeyard.RouterSizes(D, E, vocab_size=9)
    gate = moeyard.router(kind).build(sizes).double().eval()
    given = replace(rows(), ids_T=torch.zeros(T, dtype=torch.int64))
    with pytest.raises(ConfigError, match=rf"do not fit: expert id {bad} is outside \[-1, 6\); "):
        gate.route_to(given, torch.full((T, 1), bad, dtype=torch.int32))
