"""Which GPU a rank computes on."""

import os

import torch

from ..errors import ConfigError
from .watch.watch import Watch

NO_GPU, NOT_ENOUGH = "no GPU", "not enough GPUs"


def take_gpu(watch: Watch) -> None:
    """Make this rank's GPU the current device, if the host has any; every rank must call it.

    Raises :class:`ConfigError` on all ranks unless each has a GPU of its own: two ranks on one GPU
    are not something NCCL can do.
    """
    local_rank, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    number = number_of(local_rank, count)
    name = NO_GPU if count == 0 else NOT_ENOUGH
    if number is not None:
        name = str(torch.cuda.get_device_properties(number).uuid)
    everyone = watch.gather(name)

    def judge() -> None:
        seen: dict[str, int] = {}
        for rank, gpu in enumerate(everyone):
            if gpu == NOT_ENOUGH or gpu in seen:
                raise ConfigError(
                    f"{watch.where(rank)} has no GPU for itself; start as many ranks on a host as "
                    "it has GPUs (--nproc-per-node), or set CUDA_VISIBLE_DEVICES to an empty text "
                    "to train on CPUs."
                )
            if gpu != NO_GPU:
                seen[gpu] = rank

    watch.on_rank_0(judge)
    if number is not None:
        torch.cuda.set_device(number)


def number_of(local_rank: int, count: int) -> int | None:
    """Return which of ``count`` visible GPUs a host's ``local_rank`` takes, or None.

    Some launchers show each rank one GPU only, another one each (Slurm's ``--gpus-per-task=1``).
    """
    if local_rank < count:
        return local_rank
    return 0 if count == 1 else None
