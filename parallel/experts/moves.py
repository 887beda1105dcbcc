"""Experts change their owners: what belongs to a slot travels to another rank.

S slots of a layer here.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..planning.placement import Placement
from ..watch.pulse import pulse


@pulse.in_collective("the move of experts to other ranks")
def move_slots(
    tensors: Sequence[Tensor], before: Placement, after: Placement, group: dist.ProcessGroup
) -> list[Tensor]:
    """Return a layer's tensors ``[S, ...]`` with the slots of ``after``, in the order of experts.

    ``tensors`` share a type, and their slots are those that this rank has in ``before``, in the
    same order. Experts that stay are copied. All ranks of the group call it.
    """
    rank = dist.get_rank(group)
    old, new = before.owned_by(rank), after.owned_by(rank)
    found = [tensor.new_empty(len(new), *tensor.shape[1:]) for tensor in tensors]
    for expert, (source, target) in enumerate(zip(before.owner_E, after.owner_E, strict=True)):
        if rank == source == target:
            for tensor, moved in zip(tensors, found, strict=True):
                moved[new.index(expert)] = tensor[old.index(expert)]
        elif rank == source:
            slot = old.index(expert)
            message = torch.cat([tensor[slot].reshape(-1) for tensor in tensors])
            dist.send(message, dist.get_global_rank(group, target), group=group)
        elif rank == target:
            parts = [moved[new.index(expert)] for moved in found]
            message = parts[0].new_empty(sum(part.numel() for part in parts))
            dist.recv(message, dist.get_global_rank(group, source), group=group)
            pieces = message.split([part.numel() for part in parts])
            for part, piece in zip(parts, pieces, strict=True):
                part.copy_(piece.view_as(part))
    return found
