"""From a model folder and a budget to a store."""

import torch

from ...moe.folders.expert_slots import empty_experts, expert_bytes
from ...moe.folders.folder import ModelFolder
from ...moe.routes.identity import identity_of
from .budget import count_slots
from .options import StoreOptions
from .policies.policy import CacheFacts
from .policies.table import open_policy
from .read_queue import ReadQueue
from .store import ExpertStore
from .tiers.disk import DiskTier
from .tiers.open import open_tiers


def open_store(
    folder: ModelFolder,
    dtype: torch.dtype,
    budget_bytes: int,
    num_threads: int = 4,
    options: StoreOptions | None = None,
) -> ExpertStore:
    """Return a store of the experts of a model folder, with as many slots as a budget holds."""
    options = options or StoreOptions()
    num_slots = count_slots(folder, dtype, budget_bytes)
    config, moe = folder.config, folder.config.moe
    assert moe is not None, "slots were counted"
    facts = CacheFacts(
        tuple(config.moe_layers), moe.num_experts, num_slots, identity_of(config).architecture
    )
    slot_bytes = expert_bytes(config, dtype, folder.packed)
    tiers = open_tiers(DiskTier(folder), folder, dtype, slot_bytes, options.host_memory)
    return ExpertStore(
        facts,
        slot_bytes=slot_bytes,
        memory=empty_experts(config, num_slots, dtype, folder.packed),
        tier=tiers.first,
        reads=ReadQueue(num_threads),
        policy=open_policy(options.policy, facts),
        rates=tiers.rates,
        on_close=tiers.close,
    )
