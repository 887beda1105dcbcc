"""Which rows of a batch are of prompts, and which of answers that use core channels.

T tokens, K choices, R = T*K routed rows, D model width, F expert width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.values.row_channels import RowChannels
from ..adapters.rows import AdapterRows
from ..routers.routing import Routing
from .adapted import adapted_path
from .base import LayerExperts
from .core_channels import CoreChannels
from .path import Beside, ExpertPath, LocalPath


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of one sequence."""

    core: CoreChannels
    first: int
    """In the batch."""
    num_prompt: int
    """Rows that are of the prompt; the others, after them, are of the answer."""
    end: int
    start: int
    """Position of the first one."""


class CoreRows:
    """The core channels of a batch's sequences; None for sequences that use all channels."""

    def __init__(
        self, of: Sequence[CoreChannels | None], lengths: Sequence[int], starts: Sequence[int]
    ) -> None:
        self._given = tuple(zip(of, lengths, starts, strict=True))
        self._rows: list[_Rows] = []
        first = 0
        for core, length, start in self._given:
            if core is not None:
                num_prompt = min(length, max(0, core.num_prompt - start))
                self._rows.append(_Rows(core, first, num_prompt, first + length, start))
            first += length

    def subset(self, sequences: Iterable[int]) -> "CoreRows | None":
        """Return those of some sequences of the batch."""
        given = [self._given[index] for index in sequences]
        of, lengths = [core for core, _, _ in given], [length for _, length, _ in given]
        return core_rows(of, lengths, [start for _, _, start in given])

    def run(self, layer: LayerExperts, x_TD: Tensor, routing: Routing) -> Tensor:
        """Return what a layer's experts make of ``x``, and count what prompts do there."""
        experts_TK, weights_TK = routing.experts_TK, routing.weights_TK
        new = [(rows, self._num_new(layer, rows)) for rows in self._rows]
        act_RF = None
        if any(count for _, count in new):
            shape = (experts_TK.numel(), self._rows[0].core.mode.d_expert)
            act_RF = torch.empty(shape, dtype=x_TD.dtype)
        channels = RowChannels(self._used(layer, experts_TK), act_RF)
        y_TD = layer.by_channel(x_TD, experts_TK, weights_TK, channels)
        for rows, count in new:
            if act_RF is not None and count:
                end = rows.first + rows.num_prompt
                chosen_r = experts_TK[end - count : end].flatten()
                act_rF = act_RF.unflatten(0, experts_TK.shape)[end - count : end].flatten(0, 1)
                rows.core.see(layer, chosen_r, act_rF, count)
        return y_TD

    def _num_new(self, layer: LayerExperts, rows: _Rows) -> int:
        return rows.core.num_uncounted(layer, rows.start, rows.start + rows.num_prompt)

    def _used(self, layer: LayerExperts, experts_TK: Tensor) -> Tensor | None:
        """Return the channels that each routed row uses, ``[R, F]``; None where rows use all."""
        answers = [rows for rows in self._rows if rows.first + rows.num_prompt < rows.end]
        if not answers:
            return None
        width, num_choices = self._rows[0].core.mode.d_expert, experts_TK.shape[1]
        used_RF = torch.ones(experts_TK.numel(), width, dtype=torch.bool)
        for rows in answers:
            first = rows.first + rows.num_prompt
            chosen_r = experts_TK[first : rows.end].flatten()
            used_RF[first * num_choices : rows.end * num_choices] = rows.core.used(layer, chosen_r)
        return used_RF


def core_rows(
    of: Sequence[CoreChannels | None] | None, lengths: Sequence[int], starts: Sequence[int]
) -> CoreRows | None:
    """Return the core channels of a batch's sequences, or None if no sequence has some.

    ``starts`` are the positions of first rows.
    """
    if of is None or all(core is None for core in of):
        return None
    return CoreRows(of, lengths, starts)


class CorePath(LocalPath):
    """All experts are in reach of this process, and answers use core channels."""

    def __init__(self, rows: CoreRows) -> None:
        self._rows = rows

    def run(
        self, x_TD: Tensor, routing: Routing, experts: LayerExperts, beside: Beside | None = None
    ) -> Tensor:
        """See :class:`ExpertPath`."""
        y_TD = self._rows.run(experts, x_TD, routing)
        return y_TD if beside is None else y_TD + beside()


def path_of(
    path: ExpertPath, experts: LayerExperts, adapters: AdapterRows | None, core: CoreRows | None
) -> ExpertPath:
    """Return the path of a batch with adapters or core channels to a layer's experts.

    Models whose answers use core channels have no adapters of experts (folders/peft/read.py).
    """
    if core is not None:
        return CorePath(core)
    return path if adapters is None else adapted_path(path, adapters, experts)
