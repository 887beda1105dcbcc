"""The arguments of a server about several owners of experts, and their checks."""

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, Field

from ..errors import ConfigError
from ..moe.folders.folder import ModelFolder
from .expert_parallel.placement_file import read_ownership
from .experts.budget import AUTO, bytes_of_experts

NOT_OFFERED: Mapping[str, object] = {
    "expert_sparsity": None,
    "expert_fallback": None,
    "expert_log": None,
    "expert_predictor": "none",
    "host_memory": None,
    "lora": [],
    "allow_lora_updates": False,
}
"""Options that several owners do not know, and their values when they are not used."""


class ExpertParallelArgs(BaseModel):
    """Who computes the experts of a replica."""

    expert_parallel: int = Field(default=1, ge=1)
    """Processes that share the experts of a replica: the replica itself and Ray actors."""
    expert_placement: str | None = None
    """A plan of ``moeyard trace place``, or recorded routes, which say who has which expert; None =
    neighbouring experts share a process."""


def check_combination(args: ExpertParallelArgs) -> None:
    """Raise :class:`ConfigError` for arguments of a server that do not fit each other."""
    if args.expert_parallel == 1:
        if args.expert_placement is not None:
            raise ConfigError(
                f"expert-placement is {args.expert_placement!r}, but expert-parallel is 1; set it "
                "to the number of owners, or leave expert-placement out."
            )
        return
    given = args.model_dump()
    for name, unused in NOT_OFFERED.items():
        if given[name] not in (unused, "0"):
            raise ConfigError(
                f"{name.replace('_', '-')} is set, which expert-parallel {args.expert_parallel} "
                "does not offer; leave one out."
            )
    if given["expert_memory"] == AUTO:
        raise ConfigError(
            f"expert-memory is auto, but expert-parallel is {args.expert_parallel}, and it is a "
            "budget of each owner; give a size such as 8GiB or 25%."
        )


def check_owners_fit(args: ExpertParallelArgs, folder: ModelFolder) -> None:
    """Raise :class:`ConfigError` or :class:`DataError` for owners that do not fit the model."""
    if args.expert_parallel > 1:
        placement = None if args.expert_placement is None else Path(args.expert_placement)
        read_ownership(placement, folder.config, args.expert_parallel)


def bytes_elsewhere(
    folder: ModelFolder, dtype: torch.dtype, expert_memory: str | None, num_owners: int
) -> int:
    """Return the bytes that owners keep in addition to what ``expert_memory`` asks for.

    Without a budget they share what one process would keep.
    """
    if expert_memory is None or num_owners == 1:
        return 0
    each = bytes_of_experts(folder, dtype, expert_memory)
    return min((num_owners - 1) * each, bytes_of_experts(folder, dtype, None) - each)
