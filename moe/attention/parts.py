"""Which rows of a batch attend together.

Sequences that add one row run on other kernels, which round differently and know no adapters. Only
the length of a sequence and its adapter decide which kernels run it, so that its bits never depend
on the other sequences.

T rows of a batch, N rows of a part, H head width.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ...kernels.attention import RowStep, can_attend_rows, prepare_rows
from ..batch import Batch
from ..kv_blocks import BlockCache
from ..kv_cache import KVCache
from .rope import Tables


@dataclass(frozen=True, slots=True)
class Part:
    """Some sequences of a batch."""

    batch: Batch
    rope: Tables
    """Cosines and sines of the rows, ``[N, 1, H]``."""
    rows_N: Tensor | None = None
    """int64: rows of these sequences; None = all."""
    step: RowStep | None = None
    """The caches, if each sequence adds one row and a kernel may support it."""


def parts_of(batch: Batch, rope: Tables) -> list[Part]:
    """Split a batch into the sequences of one row that have a cache, and the others."""
    if batch.caches is None:
        return [Part(batch, rope)]
    singles = [_is_single(batch, cache, i) for i, cache in enumerate(batch.caches)]
    if not any(singles) or not can_attend_rows(rope):
        return [Part(batch, rope)]
    if all(singles):
        return [Part(batch, rope, step=prepare_rows(batch.caches))]
    starts = list(accumulate(batch.lengths, initial=0))
    parts = []
    for is_single in (True, False):
        chosen = [i for i, found in enumerate(singles) if found == is_single]
        rows_N = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen])
        some, tables = batch.subset(chosen, rows_N), (rope[0][rows_N], rope[1][rows_N])
        step = prepare_rows(some.caches or ()) if is_single else None
        parts.append(Part(some, tables, rows_N, step))
    return parts


def _is_single(batch: Batch, cache: KVCache, sequence: int) -> bool:
    """Say whether the kernels for single rows may run a sequence."""
    if batch.lengths[sequence] != 1 or isinstance(cache, BlockCache):
        return False
    return batch.adapters is None or not batch.adapters.update_attention(sequence)
