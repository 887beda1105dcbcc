"""Which numbers ZeRO gives a rank, and how a range of a tensor is cut for a checkpoint."""

import math

import pytest
import torch

from moeyard.parallel.dense.flat_part import FlatPart, boxes
from moeyard.parallel.dense.zero_layout import places

NUMELS = [
    [1],
    [7, 1, 12],
    [64, 3, 3, 100, 1],
    [2] * 9,
]


@pytest.mark.parametrize("numels", NUMELS)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_number_belongs_to_one_rank_and_has_its_own_room_there(stage, numels, ranks):
    owners = [torch.zeros(numel, dtype=torch.int64) for numel in numels]
    for rank in range(ranks):
        rooms: list[int] = []
        for place, owner in zip(places(stage, numels, ranks, rank), owners, strict=True):
            owner[place.start : place.stop] += 1
            rooms += range(place.offset, place.offset + place.stop - place.start)
        assert len(set(rooms)) == len(rooms)
    assert all(bool((owner == 1).all()) for owner in owners)


def test_stages_1_and_2_cut_one_row_of_all_parameters_and_stage_3_each_parameter():
    assert places(2, [5, 6], 2, 0) == [(0, 5, 0), (0, 1, 5)]  # 11 numbers, 6 a rank
    assert places(2, [5, 6], 2, 1) == [(5, 5, 0), (1, 6, 0)]
    assert places(3, [5, 6], 2, 0) == [(0, 3, 0), (0, 3, 3)]
    assert places(3, [5, 6], 2, 1) == [(3, 5, 0), (3, 6, 3)]  # a room of 3 for 2 numbers


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (3, 2, 2), (1, 6)])
def test_boxes_hold_the_numbers_of_a_range_in_order(shape):
    whole = torch.arange(math.prod(shape)).view(shape)
    for start in range(whole.numel() + 1):
        for stop in range(start, whole.numel() + 1):
            found = []
            for offset, sizes in boxes(shape, start, stop):
                cut = tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))
                found += whole[cut].flatten().tolist()
            assert found == list(range(start, stop))
            assert len(boxes(shape, start, stop)) <= max(1, 2 * len(shape) - 1)


def test_what_is_stored_shares_the_memory_of_the_part():
    part = FlatPart((3, 4), 3, torch.arange(6.0), None, lambda whole: None)
    stored = part.stored(part.local)
    assert stored.shape == (3, 4)
    assert [tuple(offset) for offset, _ in stored.pieces] == [(0, 3), (1, 0), (2, 0)]
    stored.pieces[1][1].fill_(9)
    assert part.local.tolist() == [0, 9, 9, 9, 9, 5]


def test_a_rank_without_a_number_of_a_parameter_stores_nothing():
    part = FlatPart((2,), 2, torch.empty(0), None, lambda whole: None)
    assert part.stored(part.local) is None
