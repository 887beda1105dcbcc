"""Ranks that hold the same experts share out their optimizer state: ZeRO-1 (Rajbhandari 2020).

An expert's matrices stay whole, so that any rule can update them. The slots of a rank, over all
layers, are one row, and each rank of the group owns an equal stretch of it. So layers with fewer
slots than the group has ranks are shared out too.

Gradients are summed on owners alone, and owners send the new weights. Together this is as much on
the links as one sum on all ranks.

S slots of a layer here.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch.distributed as dist
from torch import Tensor, nn

from ...moe.experts.resident import Experts
from ..mesh import Mesh
from ..watch.pulse import pulse


class ExpertShards:
    """Which slots of each layer's experts a rank of ``group`` owns."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank, size = dist.get_rank(group), dist.get_world_size(group)
        layers = [module for module in model.modules() if isinstance(module, Experts)]
        bounds = split_evenly([len(experts.expert_ids) for experts in layers], size)
        self._slots = {
            parameter: slots
            for experts, slots in zip(layers, bounds, strict=True)
            for parameter in experts.parameters()
        }
        """By parameter of experts: the slots of each rank."""

    @classmethod
    def of(cls, model: nn.Module, mesh: Mesh) -> "ExpertShards | None":
        """Return the shards; None where each expert is on one rank only."""
        group = mesh.edp_group
        if group is None or dist.get_world_size(group) == 1:
            return None
        return cls(model, group)

    def owned(self, parameter: nn.Parameter) -> slice:
        """Return the slots of an experts' parameter that this rank owns, perhaps none."""
        return self._slots[parameter][self._rank]

    def owned_gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """Return the main gradients of the slots that this rank owns."""
        return [p.main_grad[self.owned(p)] for p in parameters]  # type: ignore[attr-defined]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum main gradients over the ranks, each slot's on its owner; others have no sums."""
        sums = (
            dist.reduce(p.main_grad[slots], owner, group=self._group, async_op=True)  # type: ignore[attr-defined]
            for p, slots, owner in self._parts(parameters)
        )
        for work in list(sums):
            work.wait()

    @pulse.in_collective("the exchange of updated experts")
    def share(self, parameters: Iterable[nn.Parameter]) -> None:
        """Send the owned slots of experts' parameters to the other ranks, which do the same."""
        sent = [
            dist.broadcast(p.data[slots], owner, group=self._group, async_op=True)
            for p, slots, owner in self._parts(parameters)
        ]
        for work in sent:
            work.wait()

    def _parts(
        self, parameters: Iterable[nn.Parameter]
    ) -> Iterator[tuple[nn.Parameter, slice, int]]:
        """Yield parameters with the slots that a rank owns, and that rank's global number."""
        for parameter in parameters:
            for rank, slots in enumerate(self._slots[parameter]):
                if slots.start < slots.stop:
                    yield parameter, slots, dist.get_global_rank(self._group, rank)


def split_evenly(lengths: list[int], size: int) -> list[list[slice]]:
    """Cut a row of layers, of so many slots each, into ``size`` stretches of equal length.

    Returns the slots of each layer that belong to stretch 0, 1, and so on.
    """
    total, first = sum(lengths), 0
    bounds = [total * number // size for number in range(size + 1)]
    found = []
    for length in lengths:
        cuts = [min(max(bound - first, 0), length) for bound in bounds]
        found.append([slice(start, stop) for start, stop in pairwise(cuts)])
        first += length
    return found
