"""Expert capacity drops the rows that its rule names, sequence by sequence, in training only."""

import math

import pytest
import torch

import moeyard
from moeyard.moe.routers.capacity import Capacity, apply_capacity
from moeyard.moe.routers.routing import RouterInput, Routing, count_choices

E, LENGTHS = 4, (9, 1, 6)
TOTAL = sum(LENGTHS)


def scores(seed=0) -> torch.Tensor:
    """Scores that prefer the first experts, so that some are overfull."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(TOTAL, E, generator=generator, dtype=torch.float64)
    return (drawn - torch.arange(E)).softmax(-1)


def chosen(scores_TE, k, valid_T=None) -> Routing:
    weights_TK, experts_TK = scores_TE.topk(k)
    if valid_T is not None:
        experts_TK = torch.where(valid_T.unsqueeze(1), experts_TK, -1)
    counts_E = count_choices(experts_TK, E)
    return Routing(experts_TK.int(), weights_TK, counts_E, torch.tensor(TOTAL))


def by_hand(scores_TE, k, capacity, valid) -> list[list[int]]:
    """Fill the experts of each sequence, one choice at a time."""
    best = scores_TE.topk(k).indices.tolist()
    kept = [[-1] * k for _ in range(TOTAL)]
    first = 0
    for length in LENGTHS:
        tokens = [t for t in range(first, first + length) if valid[t]]
        first += length
        exact = len(tokens) * k * capacity.factor / E
        rows = math.floor(exact) if capacity.rounding == "down" else math.ceil(exact)
        rows = -(-rows // capacity.multiple_of) * capacity.multiple_of
        rows = max(rows, capacity.at_least)
        if capacity.drop == "batch_priority":
            tokens.sort(key=lambda t: -float(scores_TE[t].max()))
        queue = [(t, c) for c in range(k) for t in tokens]
        if capacity.drop == "probability":
            queue.sort(key=lambda pair: -float(scores_TE[pair[0], best[pair[0]][pair[1]]]))
        taken = [0] * E
        for token, column in queue:
            expert = best[token][column]
            if taken[expert] < rows:
                taken[expert] += 1
                kept[token][column] = expert
    return kept


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("drop", ["position", "probability", "batch_priority"])
@pytest.mark.parametrize(
    "rounding", [{}, {"rounding": "up"}, {"rounding": "up", "multiple_of": 2}, {"at_least": 3}]
)
def test_an_expert_keeps_the_rows_that_filling_it_by_hand_gives(k, drop, rounding):
    capacity = Capacity(factor=0.8, drop=drop, **rounding)
    scores_TE = scores()
    for valid_T in (None, torch.arange(TOTAL) % 4 != 1):
        routing = chosen(scores_TE, k, valid_T)
        before_E = routing.counts_E
        given = RouterInput(lengths=LENGTHS, valid_T=valid_T)
        apply_capacity(routing, scores_TE, capacity, given)
        valid = [True] * TOTAL if valid_T is None else valid_T.tolist()
        expected = by_hand(scores_TE, k, capacity, valid)
        assert routing.experts_TK.tolist() == expected
        kept = [expert for row in expected for expert in row if expert >= 0]
        assert routing.counts_E.tolist() == [kept.count(expert) for expert in range(E)]
        assert torch.equal(routing.extra_counts["chosen_E"], before_E)
        assert int(routing.extra_counts["dropped"]) == int(before_E.sum()) - len(kept) > 0


def test_first_choices_have_their_place_before_any_second_choice():
    scores_TE = torch.tensor([[0.3, 0.7], [0.9, 0.1], [0.8, 0.2]])
    routing = Routing(
        torch.tensor([[1, 0], [0, 1], [0, 1]]).int(),
        torch.ones(3, 2),
        torch.tensor([3, 3]),
        torch.tensor(3),
    )
    apply_capacity(routing, scores_TE, Capacity(factor=2 / 3), RouterInput())
    assert routing.experts_TK.tolist() == [[1, -1], [0, 1], [0, -1]]


@pytest.mark.parametrize("drop", ["position", "probability", "batch_priority"])
def test_enough_room_drops_nothing(drop):
    scores_TE = scores()
    routing = chosen(scores_TE, 2)
    before = routing.experts_TK
    apply_capacity(routing, scores_TE, Capacity(factor=E, drop=drop), RouterInput(lengths=LENGTHS))
    assert torch.equal(routing.experts_TK, before) and int(routing.extra_counts["dropped"]) == 0


def test_drops_are_tensor_operations_only():
    capacity = Capacity(factor=0.8)

    def kept(experts_TK, scores_TE):
        routing = Routing(experts_TK, scores_TE, count_choices(experts_TK, E), torch.tensor(TOTAL))
        apply_capacity(routing, scores_TE, capacity, RouterInput(lengths=LENGTHS))
        return routing.experts_TK

    routing = chosen(scores(), 2)
    compiled = torch.compile(kept, backend="eager", fullgraph=True)
    assert torch.equal(compiled(routing.experts_TK, scores()), kept(routing.experts_TK, scores()))


def test_a_dropped_choice_adds_nothing_and_gives_its_expert_no_gradient():
    torch.manual_seed(0)
    router = moeyard.router(
        "noisy",
        k=1,
        noise="none",
        renormalize=False,
        importance_loss=0,
        load_loss=0,
        capacity={"factor": 0.5, "at_least": 0},
    )
    layer = moeyard.MoELayer(8, 6, E, router, backend="reference").double()
    x = torch.randn(2, 1, 8, dtype=torch.float64)  # int(1 * 0.5 / 4) = 0: no expert has a place
    y, routing = layer.train()(x)
    assert (routing.experts_TK == -1).all() and not y.any()
    assert (
        layer.gate.dropped(
            moeyard.GlobalCounts(routing.counts_E, routing.num_tokens, routing.extra_counts)
        )
        == 2
    )
    y, routing = layer.eval()(x)
    assert (routing.experts_TK >= 0).all() and "dropped" not in routing.extra_counts
