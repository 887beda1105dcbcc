"""Attention in both directions: each row sees all rows of its own sequence.

T tokens, D model width, Q heads, H head width, B sequences of padded length L.

A ragged batch takes one call for each padded length. Padding is hidden by a mask, so a row's result
does not depend on the other sequences.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Batch
from ..linear import Linear


class FullRows(NamedTuple):
    """How the rows of a batch meet in attention, made once for all layers."""

    rows_P: Tensor | None
    """int64: the batch's row at each place of the concatenated groups; None = all lengths are
    equal, and rows stay where they are."""
    places_T: Tensor | None
    """int64: the place of each row."""
    groups: tuple[tuple[int, int], ...]
    """(number of sequences, padded length) of each group."""
    masks: tuple[Tensor | None, ...]
    """bool ``[B, 1, 1, L]`` of each group, True for rows that are there; None = all are."""


def full_rows(batch: Batch) -> FullRows:
    """Group the sequences of a batch by padded length; ``batch.packing`` says which those are.

    Sequences of different lengths need it; :func:`.documents.batch_of_lengths` makes it.
    """
    if batch.is_uniform or not batch.lengths:
        groups = ((len(batch.lengths), batch.lengths[0]),) if batch.lengths else ()
        return FullRows(None, None, groups, (None,) * len(groups))
    packing = batch.packing
    assert packing is not None, "sequences of different lengths need a packing"
    device = batch.ids_T.device
    lengths, start = _in_order_of_groups(batch.lengths, packing.groups), 0
    masks: list[Tensor | None] = []
    for count, padded in packing.groups:
        own = lengths[start : start + count]
        start += count
        if all(length == padded for length in own):
            masks.append(None)
            continue
        is_real_BL = np.arange(padded)[None] < np.array(own)[:, None]
        masks.append(torch.from_numpy(is_real_BL).to(device)[:, None, None])
    return FullRows(packing.rows_P, packing.places_T, packing.groups, tuple(masks))


def _in_order_of_groups(lengths: Sequence[int], groups: Sequence[tuple[int, int]]) -> list[int]:
    """Return the lengths of sequences, group after group and in the batch's order inside one.

    A sequence is in the first group that is long enough.
    """
    sizes = np.array([padded for _, padded in groups])
    group_of = np.searchsorted(sizes, np.array(lengths))
    return [lengths[index] for index in np.argsort(group_of, kind="stable")]


def attend_fully(q_TQH: Tensor, k_TQH: Tensor, v_TQH: Tensor, rows: FullRows) -> Tensor:
    """Return each row's attention over its own sequence, ``[T, Q, H]``."""
    if not rows.groups:
        return q_TQH
    parts = [q_TQH, k_TQH, v_TQH]
    if rows.rows_P is not None:
        parts = [t.index_select(0, rows.rows_P) for t in parts]
    sizes = [count * length for count, length in rows.groups]
    out = []
    groups = zip(*(t.split(sizes) for t in parts), rows.groups, rows.masks, strict=True)
    for *of_group, (_, length), mask in groups:
        q, k, v = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in of_group)
        attended_BQLH = F.scaled_dot_product_attention(q, k, v, mask)
        out.append(attended_BQLH.transpose(1, 2).flatten(0, 1))
    out_PQH = torch.cat(out)
    return out_PQH if rows.places_T is None else out_PQH.index_select(0, rows.places_T)


class FullAttention(nn.Module):
    """Multi-head attention without a causal mask; all projections have biases (BERT's)."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = Linear(d_model, d_model, bias=True)
        self.k_proj = Linear(d_model, d_model, bias=True)
        self.v_proj = Linear(d_model, d_model, bias=True)
        self.o_proj = Linear(d_model, d_model, bias=True)

    def forward(self, x_TD: Tensor, rows: FullRows) -> Tensor:
        """Return the attention output, ``[T, D]``."""
        q, k, v = (
            projection(x_TD).unflatten(-1, (self.num_heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_TD: Tensor = self.o_proj(attend_fully(q, k, v, rows).flatten(-2))
        return out_TD
