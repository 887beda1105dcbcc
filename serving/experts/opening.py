"""From a model folder and a budget to a store."""

import weakref

import torch

from ...moe.folders.expert_slots import empty_experts, expert_bytes
from ...moe.folders.folder import ModelFolder
from ...moe.routes.identity import identity_of
from .budget import count_slots
from .event_log import EventLog
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
    policy = open_policy(options.policy, facts)
    tiers = open_tiers(DiskTier(folder), folder, dtype, slot_bytes, options.host_memory)
    store = ExpertStore(
        facts,
        slot_bytes,
        memory=empty_experts(config, num_slots, dtype, folder.packed),
        tier=tiers.first,
        reads=ReadQueue(num_threads),
        policy=policy,
        rates=tiers.rates,
        on_close=tiers.close,
    )
    if options.log is not None:
        name = options.policy if isinstance(options.policy, str) else type(policy).__name__
        store.statistics.log = EventLog(options.log, facts, slot_bytes, name)
        weakref.finalize(store, store.statistics.close)  # also when the program ends
    return store
