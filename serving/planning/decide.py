"""From what the user asks for to bytes: budgets that depend on the machine."""

import torch

from ...moe.folders.folder import ModelFolder
from ..experts.budget import AUTO
from ..memory import available_bytes
from .budget import Demand, Room, auto_budget, divide
from .sizes import ModelSizes, sizes_of


def decide(
    folder: ModelFolder,
    dtype: torch.dtype,
    expert_memory: str | None,
    demand: Demand,
    reader: str = "auto",
) -> tuple[str | None, Room | None]:
    """Return a budget without ``auto``, and how memory was divided if it was auto.

    None keeps all experts in memory. Raises :class:`ConfigError` for ``auto`` where the model has
    no experts, or where not one fits.
    """
    if expert_memory != AUTO:
        return expert_memory, None
    sizes: ModelSizes = sizes_of(folder, dtype, demand.kv_dtype)
    room = divide(sizes, available_bytes(), demand, is_buffered=reader != "direct")
    return auto_budget(sizes, room), room
