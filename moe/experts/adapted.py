"""The path to a layer's experts for batches with adapters.

N rows, n rows of one adapter or of none, D model width.
"""

import torch
from torch import Tensor

from ...kernels.adapted_waves import AdaptedWaves
from ...kernels.values.quantized_weights import SlotWeights
from ..adapters.rows import AdapterRows, RowUpdates
from ..routers.routing import Routing
from .base import LayerExperts
from .path import Beside, ExpertPath, LocalPath


class AdaptedPath(LocalPath):
    """All experts are in reach of this process, and some rows have an update of them."""

    def __init__(self, updates: RowUpdates) -> None:
        self.updates = updates

    def run(
        self, x_TD: Tensor, routing: Routing, experts: LayerExperts, beside: Beside | None = None
    ) -> Tensor:
        """See :class:`ExpertPath`."""
        y_TD = experts.adapted(x_TD, routing.experts_TK, routing.weights_TK, self.updates)
        return y_TD if beside is None else y_TD + beside()


def adapted_path(path: ExpertPath, adapters: AdapterRows, experts: LayerExperts) -> ExpertPath:
    """Return ``path`` if no adapter of the batch updates these experts, else one that does it."""
    updates = adapters.expert_updates(experts)
    return AdaptedPath(updates) if updates else path


def of_lines(path: ExpertPath, tokens_N: Tensor) -> ExpertPath:
    """Return the path for rows that are lines of tokens, ``tokens_N`` (routers/split_rows.py)."""
    if not isinstance(path, AdaptedPath):
        return path
    device = tokens_N.device
    lines = [torch.isin(tokens_N, rows.to(device)).nonzero().flatten() for rows, _ in path.updates]
    updates = [update for _, update in path.updates]
    return AdaptedPath(list(zip(lines, updates, strict=True)))


def rows_without(updates: RowUpdates, num_rows: int) -> Tensor:
    """Return the rows that have none of the updates, int64."""
    is_free_N = torch.ones(num_rows, dtype=torch.bool)
    for rows_n, _ in updates:
        is_free_N[rows_n.cpu()] = False
    return is_free_N.nonzero().flatten()


def run_in_memory(
    experts: LayerExperts,
    weights: SlotWeights,
    rows: tuple[Tensor, Tensor, Tensor],
    updates: RowUpdates,
) -> Tensor:
    """Return the weighted sums of experts whose ``weights`` are all in memory, ``[N, D]``.

    ``rows`` are x, the choices and their weights.
    """
    x_ND = rows[0]
    y_ND = torch.empty_like(x_ND)
    free_n = rows_without(updates, len(x_ND)).to(x_ND.device)
    if len(free_n):
        y_ND[free_n] = experts(*(part.index_select(0, free_n) for part in rows))
    for rows_n, update in updates:
        some_n = rows_n.to(x_ND.device)
        x_nD, experts_nK, weights_nK = (part.index_select(0, some_n) for part in rows)
        waves = AdaptedWaves(x_nD, experts_nK, weights_nK, weights.num_experts, update)
        waves.add(weights)
        y_ND[some_n] = waves.result()
    return y_ND
