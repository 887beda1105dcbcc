"""Documents packed into windows: where they begin, and how attention groups them.

B windows, L tokens each, T = B*L rows, P places after rounding lengths up.

One call per document is slow for many short documents, and a block-diagonal mask costs as much as
whole windows. So documents of similar length share one causal call. They are padded at the end,
where causality hides the padding from every real row (benchmarks/packing.py).
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..batch import Batch, Packing, batch_of_rows

STEPS = 8
"""Lengths are rounded up to multiples of the next power of two over this. For windows of 1024 with
documents of 128 on average, attention took 0.41 of whole windows' time with 8, 0.45 with 4 and 0.68
with 1. A call per document took 0.39, but 0.96 for documents of 8 (benchmarks/packing.py)."""


def batch_of_documents(ids_BL: Tensor, eos_id: int) -> Batch:
    """Concatenate windows, split into documents that do not see each other.

    A document begins with the eos that precedes it, at position 0. The row of this eos predicts the
    document's first token, and its last token predicts the next eos, so no target needs masking.
    The rest of a document that continues from the previous window begins at position 0 too.
    """
    if ids_BL.numel() == 0:
        return batch_of_rows(ids_BL)
    begins_BL = ids_BL == eos_id
    begins_BL[:, 0] = True
    starts = begins_BL.reshape(-1).nonzero().squeeze(1).cpu().numpy()
    return batch_of_lengths(ids_BL.reshape(-1), np.diff(starts, append=ids_BL.numel()))


def batch_of_lengths(ids_T: Tensor, lengths: npt.NDArray[np.int64]) -> Batch:
    """Split rows into documents of ``lengths`` that do not see each other, each from position 0."""
    starts = np.cumsum(lengths) - lengths
    positions_T = np.arange(len(ids_T)) - np.repeat(starts, lengths)
    device = ids_T.device
    return Batch(
        ids_T=ids_T,
        positions_T=torch.from_numpy(positions_T).to(device),
        lengths=tuple(lengths.tolist()),
        packing=pack(starts, lengths, device),
    )


def pack(
    starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], device: torch.device
) -> Packing:
    """Group sequences that begin at rows ``starts`` by their padded length."""
    padded = padded_lengths(lengths)
    places_T = np.empty(int(lengths.sum()), dtype=np.int64)
    rows, groups, place = [], [], 0
    for length in np.unique(padded):
        chosen = np.flatnonzero(padded == length)
        columns_1L, ends_S1 = np.arange(length)[None], lengths[chosen][:, None]
        # Padding repeats a sequence's last row: something finite that no real row attends to.
        rows_SL = starts[chosen][:, None] + np.minimum(columns_1L, ends_S1 - 1)
        places_SL = place + np.arange(rows_SL.size).reshape(rows_SL.shape)
        is_real_SL = columns_1L < ends_S1
        places_T[rows_SL[is_real_SL]] = places_SL[is_real_SL]
        rows.append(rows_SL.reshape(-1))
        groups.append((len(chosen), int(length)))
        place += rows_SL.size
    rows_P = torch.from_numpy(np.concatenate(rows)).to(device)
    return Packing(rows_P, torch.from_numpy(places_T).to(device), tuple(groups))


def padded_lengths(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Round up to a multiple of an eighth of the next power of two."""
    powers = 1 << np.ceil(np.log2(lengths)).astype(np.int64)
    steps = np.maximum(powers // STEPS, 1)
    return -(-lengths // steps) * steps
