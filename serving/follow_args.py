"""The argument of a server that follows a run, and what it does not go with."""

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel

from ..errors import ConfigError
from ..moe.folders.folder import ModelFolder
from ..moe.folders.tensor_names import dense_tensors
from .experts.budget import bytes_of_experts
from .live.weights import check_followable

NOT_OFFERED: Mapping[str, object] = {
    "expert_parallel": 1,
    "host_memory": None,
    "expert_sparsity": None,
    "expert_fallback": None,
    "record_routes": None,
}
"""Options that keep copies or facts of the old weights, and their values when they are not used."""


class FollowArgs(BaseModel):
    """Whose updates a server takes over."""

    follow: str | None = None
    """Folder into which a run publishes (``publish.folder``): every replica takes its versions over
    while it serves."""


def check_follow(args: FollowArgs, folder: ModelFolder) -> None:
    """Raise :class:`ConfigError` for a server that cannot follow."""
    if args.follow is None:
        return
    given = args.model_dump()
    for name, unused in NOT_OFFERED.items():
        if given[name] not in (unused, "0"):
            raise ConfigError(
                f"{name.replace('_', '-')} is set, which follow does not offer: it would go on "
                "with the old weights; leave one out."
            )
    path = Path(args.follow)
    if path.exists() and not path.is_dir():
        raise ConfigError(
            f"follow is {args.follow!r}, which is not a folder; give the run's publish.folder."
        )
    check_followable(folder)


def bytes_of_update(
    args: FollowArgs, folder: ModelFolder, dtype: torch.dtype, expert_memory: str | None
) -> int:
    """Return the most memory that an update takes until it is in place.

    Experts behind a store need none: they are read from the update when they are needed.
    """
    if args.follow is None:
        return 0
    dense = sum(tensor.numel() for _, tensor in dense_tensors(folder.config)) * dtype.itemsize
    return dense + (bytes_of_experts(folder, dtype, None) if expert_memory is None else 0)
