"""The expert store as training uses it: for the frozen experts of the folder a run starts from."""

import torch

from ..moe.folders.folder import ModelFolder
from ..moe.folders.hub import local_folder
from .experts.budget import bytes_of_experts, parse_budget
from .experts.opening import open_store
from .experts.store import ExpertStore
from .memory import available_bytes


def open_frozen(start_from: str, dtype: torch.dtype, expert_memory: str) -> ExpertStore:
    """Return a store of the experts of a folder, or of a model on the hub, in ``dtype``.

    Experts that the folder has in 8 or 4 bits stay in those. ``expert_memory`` bounds those in
    memory, ``8GiB`` or ``25%``. Raises :class:`ConfigError` for a budget that is no size, or is
    below one expert.
    """
    folder = ModelFolder(local_folder(start_from))
    whole = bytes_of_experts(folder, dtype, None)
    num_bytes = parse_budget(expert_memory, whole, "train.expert_memory")
    return open_store(folder, dtype, num_bytes, free_bytes=available_bytes())
