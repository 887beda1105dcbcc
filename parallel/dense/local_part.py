"""This rank's part of a parameter, whether it is held whole or sharded.

FSDP2 turns the parameters it shards into DTensors. DeepSpeed empties parameters or leaves them
whole, and their ``flat_part`` says which numbers are this rank's (flat_part.py). Main gradients,
masters and moments are plain tensors of this rank's part; only checkpoints use the whole parameter
again.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .flat_part import FlatPart


def flat_part(parameter: Tensor) -> FlatPart | None:
    """Return which numbers of ``parameter`` are this rank's, if DeepSpeed splits it."""
    part: FlatPart | None = getattr(parameter, "flat_part", None)
    return part


def local_part(parameter: Tensor) -> Tensor:
    """Return what this rank holds and updates of ``parameter``, sharing memory.

    If a parameter has fewer rows than there are ranks, some ranks hold none of it.
    """
    part = flat_part(parameter)
    if part is not None:
        return part.local
    data = parameter.data
    return data.to_local() if isinstance(data, DTensor) else data


def whole_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter."""
    part = flat_part(parameter)
    return parameter.shape if part is None else torch.Size(part.shape)


def held_numel(parameter: Tensor) -> int:
    """Return how many weights of ``parameter`` this rank has between steps."""
    here = local_part(parameter).numel()
    if flat_part(parameter) is None:
        return here
    return max(here, parameter.numel())  # ZeRO 1 and 2 leave it whole, 3 empties it


def as_part_of(parameter: Tensor, local: Tensor) -> Tensor | None:
    """For a checkpoint, wrap ``local`` as a part of the whole tensor if ``parameter`` is sharded.

    ``local`` has what this rank holds of ``parameter``; of rows, perhaps with fewer columns. The
    result shares its memory, so loading into it fills ``local``. None if this rank has nothing to
    write or read.
    """
    part = flat_part(parameter)
    if part is not None:
        return part.stored(local)
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
