"""Rows passed from stage to stage without gradients, as evaluation does.

Each stage knows the batch, and so the shape of what comes. Shapes may differ from call to call.

T tokens, D model width.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..mesh import Mesh
from ..watch.pulse import pulse
from .names import WAITING


@pulse.in_collective(WAITING)
def receive(
    types: Sequence[torch.dtype], shape: tuple[int, int], device: torch.device, mesh: Mesh
) -> list[Tensor]:
    """Return the tensors ``[T, D]`` that the stage before has sent for this rank, by their type."""
    group = mesh.pp_group
    assert group is not None and mesh.pp_rank > 0, "there is no stage before"
    received = [torch.empty(shape, dtype=dtype, device=device) for dtype in types]
    for rows_TD in received:
        if rows_TD.numel():  # else both know that there is nothing to send
            dist.recv(rows_TD, group_src=mesh.pp_rank - 1, group=group)
    return received


@pulse.in_collective(WAITING)
def send(rows: list[Tensor], mesh: Mesh) -> None:
    """Send tensors to the rank of the next stage that goes on with them."""
    group = mesh.pp_group
    assert group is not None and not mesh.is_last_stage, "there is no next stage"
    for rows_TD in rows:
        if rows_TD.numel():
            dist.send(rows_TD.contiguous(), group_dst=mesh.pp_rank + 1, group=group)
