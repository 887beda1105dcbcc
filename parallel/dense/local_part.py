"""This rank's part of a parameter, whether it is held whole or sharded.

FSDP2 turns the parameters it shards into DTensors. Main gradients, masters and moments are plain
tensors of this rank's part; only checkpoints speak of the whole again.
"""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(parameter: Tensor) -> Tensor:
    """Return the rows of ``parameter`` this rank holds, sharing their memory.

    Some ranks hold none of a parameter with fewer rows than there are ranks.
    """
    data = parameter.data
    return data.to_local() if isinstance(data, DTensor) else data


def as_part_of(parameter: Tensor, local: Tensor) -> Tensor:
    """Say which part of a whole ``local`` is, if ``parameter`` is sharded, for a checkpoint.

    The result shares the memory of ``local``, so loading into it fills ``local``.
    """
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
