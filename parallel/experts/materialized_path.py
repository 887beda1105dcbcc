"""The path of a layer whose busy experts have copies on more ranks.

T tokens here, D model width.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...moe.experts.base import LayerExperts
from ...moe.experts.path import Beside
from ...moe.routers.routing import Routing
from .hop import Level, RankOf
from .materialized import MaterializedExperts
from .pipelined import PipelinedPath


class MaterializedPath:
    """The path of one layer of :class:`MaterializedExperts`. Evaluation uses the owners only."""

    def __init__(self, pipeline: PipelinedPath, copies: MaterializedExperts, layer: int) -> None:
        self.pipeline, self._copies, self._layer = pipeline, copies, layer

    def gather(self, values: Tensor) -> Tensor:
        """See :class:`moeyard.moe.experts.path.ExpertPath`; the owners give theirs."""
        owned_R = self._copies.owners[self._layer].owned_by_rank()
        most = max(map(len, owned_R))
        missing = values.new_zeros(most - len(values), *values.shape[1:])
        rows = self.pipeline.gather(torch.cat([values, missing]))  # equally many on each rank
        place_of = {e: r * most + i for r, owned in enumerate(owned_R) for i, e in enumerate(owned)}
        return rows[[place_of[expert] for expert in range(len(place_of))]]

    def run(
        self, x_TD: Tensor, routing: Routing, experts: LayerExperts, beside: Beside | None = None
    ) -> Tensor:
        """See :class:`moeyard.moe.experts.path.ExpertPath`."""
        copies, layer = self._copies, self._layer
        if not copies.tables or not torch.is_grad_enabled():
            levels = self._levels(partial(copies.owner_of, layer))
            return self.pipeline.run_over(levels, x_TD, routing, experts, beside)
        levels = self._levels(copies.tables[layer].destinations)
        both, around = copies.experts_of(layer), partial(copies.backward_of, layer)
        return self.pipeline.run_over(levels, x_TD, routing, both, beside, around)

    def _levels(self, rank_of: RankOf) -> list[Level]:
        return [replace(level, rank_of=rank_of) for level in self.pipeline.levels]
