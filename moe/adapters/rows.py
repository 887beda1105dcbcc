"""Which rows of a batch go through which adapter.

N rows, n rows of one adapter, I inputs, O outputs, D model width.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from ...kernels.values.expert_update import ExpertUpdate
from .adapter import Adapter, LowRankLinear
from .routed import ChosenUpdate

RowUpdates = list[tuple[Tensor, ExpertUpdate]]
"""Rows, int64, and the update of the experts that they visit."""
ChosenRows = list[tuple[Tensor, ChosenUpdate]]
"""Rows, int64, and the LoRA experts of an MLP that they have chosen."""


class AdapterRows:
    """The adapters of a batch's sequences; None for sequences of the base model.

    Rows without an adapter are computed as in a batch without adapters, with the same bits. Rows of
    an adapter are multiplied together and do not depend on the other rows.
    """

    def __init__(self, of: Sequence[Adapter | None], lengths: Sequence[int]) -> None:
        self.of = tuple(of)
        """The adapter of each sequence."""
        self._lengths = tuple(lengths)
        spans: dict[Adapter, list[Tensor]] = {}
        starts = accumulate(lengths, initial=0)
        for adapter, start, length in zip(of, starts, lengths, strict=False):
            if adapter is not None:
                spans.setdefault(adapter, []).append(torch.arange(start, start + length))
        self._rows = [(adapter, torch.cat(rows)) for adapter, rows in spans.items()]

    def subset(self, sequences: Iterable[int]) -> "AdapterRows | None":
        """Return the adapters of some sequences of the batch; None if they have none."""
        chosen = list(sequences)
        return adapter_rows([self.of[i] for i in chosen], [self._lengths[i] for i in chosen])

    def update_attention(self, sequence: int) -> bool:
        """Say whether the adapter of a sequence updates attention, in any layer."""
        adapter = self.of[sequence]
        return adapter is not None and adapter.in_attention

    def update(self, sequence: int, layer: nn.Module) -> LowRankLinear | None:
        """Return the update of a linear layer for the rows of a sequence, if there is one."""
        adapter = self.of[sequence]
        return None if adapter is None else adapter.linears.get(layer)

    def add(self, layer: nn.Module, x_NI: Tensor, y_NO: Tensor) -> Tensor:
        """Return ``y`` with the updates of a linear layer, whose input is ``x``."""
        for adapter, rows_n in self._rows:
            update = adapter.linears.get(layer)
            if update is None:
                continue
            if len(rows_n) == len(x_NI):  # all rows: nothing to gather
                y_NO = y_NO + update.run(x_NI)
                continue
            rows_n = rows_n.to(x_NI.device)
            y_NO = y_NO.index_add(0, rows_n, update.run(x_NI.index_select(0, rows_n)))
        return y_NO

    def choose(self, mlp: nn.Module, x_ND: Tensor) -> ChosenRows:
        """Return which rows go through LoRA experts of a dense MLP, whose input is ``x``."""
        found = []
        for adapter, rows_n in self._rows:
            update = adapter.mlps.get(mlp)
            if update is not None:
                rows_n = rows_n.to(x_ND.device)
                found.append((rows_n, update.choose(x_ND.index_select(0, rows_n))))
        return found

    def expert_updates(self, experts: nn.Module) -> RowUpdates:
        """Return which rows of the batch have which update of a layer's experts."""
        found = ((rows_n, adapter.experts.get(experts)) for adapter, rows_n in self._rows)
        return [(rows_n, update) for rows_n, update in found if update is not None]


def adapter_rows(of: Sequence[Adapter | None] | None, lengths: Sequence[int]) -> AdapterRows | None:
    """Return the adapters of a batch's sequences, or None if no sequence has one."""
    if of is None or all(adapter is None for adapter in of):
        return None
    return AdapterRows(of, lengths)
