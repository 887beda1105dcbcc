"""Errors of torch.distributed that mean another rank, and not this one, is the cause."""

import torch.distributed as dist

from ...errors import LostRankError


def is_lost_rank(error: BaseException) -> bool:
    """Say whether an error means that another rank ended or did not join.

    gloo raises plain RuntimeErrors that name its source file.
    """
    if isinstance(error, LostRankError | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, or its type's name."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
