"""This rank's part of a parameter, whether it is held whole or sharded.

FSDP2 turns the parameters it shards into DTensors. Main gradients, masters and moments are plain
tensors of this rank's part; only checkpoints use the whole parameter again.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(parameter: Tensor) -> Tensor:
    """Return the rows of ``parameter`` this rank holds, sharing their memory.

    If a parameter has fewer rows than there are ranks, some ranks hold none of it.
    """
    data = parameter.data
    return data.to_local() if isinstance(data, DTensor) else data


def as_part_of(parameter: Tensor, local: Tensor) -> Tensor:
    """For a checkpoint, wrap ``local`` as a DTensor if ``parameter`` is sharded.

    ``local`` has the rows of ``parameter`` that this rank holds, perhaps with fewer columns. The
    result shares its memory, so loading into it fills ``local``.
    """
    if not isinstance(parameter, DTensor):
        return local
    shape = torch.Size((parameter.shape[0], *local.shape[1:]))
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
