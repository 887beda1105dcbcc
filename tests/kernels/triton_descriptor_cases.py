"""What the Triton kernels promise where descriptors bring tiles; run as triton_cases.py is."""

import pytest
import torch
from triton_cases import DEVICE, assert_near, expected_outcome, outcome, problem, routing

from moeyard.kernels.gpu import descriptors, grouped_matmul, tiles, up_projection

SHAPE = (131, 2, 2, 72, 136)
"""T, K, E, D, F for tiles of 128 rows, several a program, ragged on every side."""


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Choose descriptors, and note which kernels take them."""
    found = []

    def noted(module, name):
        function = getattr(module, name)

        def run(*arguments):
            found.append(name)
            return function(*arguments)

        monkeypatch.setattr(module, name, run)

    monkeypatch.setattr(descriptors, "DESCRIBED", frozenset({"up", "matmul"}))
    noted(up_projection, "described_up_projection")
    noted(grouped_matmul, "described_matmul")
    return found


@pytest.mark.parametrize(
    ("dtype", "activation"), [(torch.bfloat16, "swiglu"), (torch.float16, "geglu")], ids=str
)
def test_described_tiles_agree_with_the_reference_in_values_and_gradients(calls, dtype, activation):
    ids, leaves = routing("with_none", *SHAPE[:3]), problem(SHAPE, dtype)
    found = outcome(ids, leaves, activation=activation)
    assert_near(found, expected_outcome(ids, leaves, activation=activation), dtype)
    assert calls == ["described_up_projection", "described_matmul", "described_matmul"]


@pytest.mark.parametrize("kind", ["one_expert_takes_all", "nobody"])
def test_described_tiles_take_any_distribution_of_the_rows(calls, kind):
    ids, leaves = routing(kind, *SHAPE[:3]), problem(SHAPE, torch.float16)
    assert_near(outcome(ids, leaves), expected_outcome(ids, leaves), torch.float16)
    assert calls


def test_described_tiles_of_slots_with_gaps_read_nothing_beside_them(calls):
    ids, leaves = routing("with_none", 131, 2, 3), problem((131, 2, 2, 72, 136), torch.float16)
    table = (1, -1, 0)

    def surrounded(leaf):
        around = leaf.new_full((4, leaf[0].numel() + 64), torch.nan)
        around[1:-1, : leaf[0].numel()] = leaf.detach().flatten(1)
        strides = (around.stride(0), *leaf.stride()[1:])
        view = around.as_strided(leaf.shape, strides, around.stride(0))
        return view.detach().requires_grad_()

    expected_ids = torch.where(ids == 1, -1, ids)
    expected = expected_outcome(expected_ids, leaves, table=table)
    found = outcome(ids, [*leaves[:2], *map(surrounded, leaves[2:])], table=table)
    assert_near(found, expected, torch.float16)
    assert calls


def test_odd_strides_come_by_pointers_where_they_are(calls):
    shape = (131, 2, 2, 68, 136)  # fc1's rows are 136 bytes, and fc2's 272
    ids, leaves = routing("with_none", *shape[:3]), problem(shape, torch.float16)
    assert_near(outcome(ids, leaves), expected_outcome(ids, leaves), torch.float16)
    assert calls == ["described_matmul"]


def test_experts_with_biases_come_by_pointers_where_the_biases_are(calls):
    ids, leaves = routing("with_none", *SHAPE[:3]), problem(SHAPE, torch.float16, has_bias=True)
    assert_near(outcome(ids, leaves), expected_outcome(ids, leaves), torch.float16)
    assert calls == ["described_matmul"]  # the gradient of x, which no bias reaches


def test_only_wide_tiles_of_16_bits_come_through_descriptors(monkeypatch):
    wide, small = tiles.tiles_for("up", 128, torch.float16, True), tiles.Tiles(64, 128, 64, 4, 3)
    half = torch.zeros(2, 64, 64, dtype=torch.float16, device=DEVICE)
    assert descriptors.are_chosen("up", wide, half, half.mT)
    assert not descriptors.are_chosen("up", wide, half.float())
    assert not descriptors.are_chosen("up", small, half)
    assert not descriptors.are_chosen("up", wide, half[:, :, ::2])
    monkeypatch.setattr(descriptors, "DESCRIBED", frozenset({"matmul"}))
    assert not descriptors.are_chosen("up", wide, half)


def test_described_tiles_leave_the_rows_of_the_next_expert_alone():
    """Three tiles of expert 0, the last of them half full; another program has expert 1's first,
    and in the interpreter comes before it."""
    shape = (192, 2, 2, 72, 136)
    ids = (torch.arange(384) >= 320).long().view(192, 2)
    leaves = problem(shape, torch.float16)
    assert_near(outcome(ids, leaves), expected_outcome(ids, leaves), torch.float16)
