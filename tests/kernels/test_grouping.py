"""Grouping invariants over random and degenerate routings."""

import pytest
import torch

from moeyard.kernels.values.grouping import group_tokens

CASES = {
    "random": torch.randint(0, 7, (13, 3), generator=torch.Generator().manual_seed(0)),
    "with_none": torch.randint(-1, 7, (13, 3), generator=torch.Generator().manual_seed(1)),
    "one_expert_takes_all": torch.full((5, 2), 6),
    "nobody": torch.full((5, 2), -1),
    "no_tokens": torch.empty(0, 2, dtype=torch.int64),
    "one_token": torch.tensor([[3, 1]]),
}


@pytest.mark.parametrize("ids", CASES.values(), ids=CASES.keys())
def test_groups_rows_by_expert_stably_and_invertibly(ids):
    grouping = group_tokens(ids.int(), 7)
    flat = ids.reshape(-1)
    for expert in range(7):
        start, end = grouping.offsets_E1[expert], grouping.offsets_E1[expert + 1]
        expected = torch.nonzero(flat == expert).flatten()
        assert torch.equal(grouping.order_R[start:end], expected)
    assert torch.equal(grouping.order_R[grouping.inverse_R], torch.arange(flat.numel()))
    assert torch.equal(grouping.tokens_R, grouping.order_R // ids.shape[1])
    assert int(grouping.counts_E().sum()) == int((flat >= 0).sum())


@pytest.mark.parametrize("bad", [7, -2, 2**31 - 1])
def test_refuses_an_expert_id_out_of_range(bad):
    with pytest.raises(ValueError, match=rf"expert id {bad} is outside \[-1, 7\)"):
        group_tokens(torch.tensor([[0, bad]]), 7)
