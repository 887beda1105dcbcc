"""Which rows of a batch attend together.

Where the C++ kernels run sequences with a cache, one call takes a layer's whole attention. It knows
no adapters, so rows whose adapter updates attention go through the modules, which round between
steps. A sequence's adapter alone decides, so its bits never depend on the other sequences.

T rows of a batch, N rows of a part, H head width.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ...kernels.attention import NewRows, can_attend_rows, prepare_rows
from ..batch import Batch
from .rope import Tables


@dataclass(frozen=True, slots=True)
class Part:
    """Some sequences of a batch."""

    batch: Batch
    rope: Tables
    """Cosines and sines of the rows, ``[N, 1, H]``."""
    rows_N: Tensor | None = None
    """int64: rows of these sequences; None = all."""
    new: NewRows | None = None
    """The sequences' caches, if they have any and the C++ kernels run."""
    is_adapted: bool = False
    """Whether adapters of these sequences update attention."""


def parts_of(batch: Batch, rope: Tables) -> list[Part]:
    """Split a batch into the sequences whose adapter updates attention, and the others."""
    if batch.caches is None or not can_attend_rows(rope):
        return [Part(batch, rope)]
    adapters = batch.adapters
    adapted = [
        adapters is not None and adapters.update_attention(i) for i in range(len(batch.lengths))
    ]
    if len(set(adapted)) < 2:
        return [
            Part(
                batch, rope, new=prepare_rows(batch.caches, batch.lengths), is_adapted=any(adapted)
            )
        ]
    starts = list(accumulate(batch.lengths, initial=0))
    parts = []
    for is_adapted in (False, True):
        chosen = [i for i, found in enumerate(adapted) if found == is_adapted]
        rows_N = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chosen])
        some, tables = batch.subset(chosen, rows_N), (rope[0][rows_N], rope[1][rows_N])
        new = prepare_rows(some.caches or (), some.lengths)
        parts.append(Part(some, tables, rows_N, new, is_adapted))
    return parts
