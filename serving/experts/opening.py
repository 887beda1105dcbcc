"""From a model folder and a budget to a store."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ...kernels.values.quantized_weights import SlotWeights
from ...moe.folders.expert_slots import empty_by_channel, empty_experts
from ...moe.folders.folder import ModelFolder
from ...moe.folders.tensor_names import dense_tensors
from ...moe.routes.identity import identity_of
from .budget import count_in_pools
from .by_channel import open_channels
from .channel_filler import ChannelFiller
from .event_log import EventLog
from .options import StoreOptions
from .policies.policy import CacheFacts
from .policies.table import open_policy
from .pools import Pools, pool_sizes
from .read_queue import ReadQueue
from .reading.choose import plan_reads
from .reading.native.library import Library, load
from .reading.native.plans import Plans
from .reading.native.queue import NativeQueue
from .reading.sidecar import LearnedHashes
from .reads import Reads
from .sparsity import Sparsity, read_sparsity
from .store import ExpertStore
from .tiers.disk import DiskTier
from .tiers.open import Tiers, open_tiers
from .tiers.tier import Tier


def open_store(
    folder: ModelFolder,
    dtype: torch.dtype,
    budget_bytes: int,
    num_threads: int | None = None,
    options: StoreOptions | None = None,
    free_bytes: int = 0,
) -> ExpertStore:
    """Return a store of the experts of a model folder, with as many slots as a budget holds.

    ``num_threads`` read; None = as many as a probe of the device finds best. ``free_bytes`` is the
    memory that is free before the model is loaded.
    """
    options = options or StoreOptions()
    by_channel = None if options.sparsity is None else read_sparsity(options.sparsity)
    channels = open_channels(folder, options, by_channel)
    num_slots = count_in_pools(folder, dtype, budget_bytes)
    config, moe = folder.config, folder.config.moe
    assert moe is not None, "slots were counted"
    facts = CacheFacts(
        tuple(config.moe_layers), moe.num_experts, sum(num_slots), identity_of(config).architecture
    )
    policy = open_policy(options.policy, facts)
    sizes = tuple(size.slot_bytes for size in pool_sizes(folder, dtype))
    pools = Pools(num_slots, sizes, folder.formats.kind_of)
    dense = sum(tensor.numel() for _, tensor in dense_tensors(config)) * dtype.itemsize
    plan = plan_reads(folder, options.reader, max(0, free_bytes - pools.num_bytes - dense))
    save = _learn_hashes(folder)
    library = None if options.host_memory is not None else load()
    disk: Tier = channels or DiskTier(folder, None if library is None else Plans(library, folder))
    if options.live is not None:
        disk = options.live.over(disk)
    read_pools = pools if channels is None else channels.pools(pools)
    tiers = open_tiers(disk, folder, dtype, read_pools, options.host_memory)
    reads = queue_of(library)(num_threads or plan.threads, partial(_end, save, tiers))
    store = ExpertStore(
        facts,
        pools,
        memory=_empty_pools(folder, num_slots, dtype, by_channel),
        tier=tiers.first,
        reads=reads,
        policy=policy,
        read_plan=plan,
        rates=tiers.rates,
        read_bytes=read_pools.bytes_of,
    )
    if channels is not None:
        store.channels = ChannelFiller(
            channels, reads, store.statistics, tiers.rates, plan.bytes_per_s
        )
    if options.log is not None:
        name = options.policy if isinstance(options.policy, str) else type(policy).__name__
        _write_log(store, EventLog(options.log, facts, pools, name))
    if save is not None:
        weakref.finalize(store, save)  # when the program ends without closing the store
    return store


def queue_of(library: Library | None) -> Callable[..., Reads]:
    """Return what makes a queue from a number of threads: of C++ where there is a library."""
    return ReadQueue if library is None else partial(NativeQueue, library)


def _empty_pools(
    folder: ModelFolder,
    num_slots: Sequence[int],
    dtype: torch.dtype,
    by_channel: Sparsity | None,
) -> list[SlotWeights]:
    """Allocate the slots of every pool."""
    if by_channel is not None:
        (count,) = num_slots  # experts in few bits are not stored by channel
        weights = empty_by_channel(folder.config, count, dtype, by_channel.by_input)
        for part in weights.parts:
            part.zero_()  # channels that are not read meet zeros, and must be finite
        return [weights]
    pools = zip(num_slots, folder.formats.kinds, strict=True)
    return [empty_experts(folder.config, count, dtype, packed) for count, packed in pools]


def _write_log(store: ExpertStore, log: EventLog) -> None:
    """Let a store write its events."""
    store.statistics.log = log
    weakref.finalize(store, store.statistics.close)  # also when the program ends


def _end(save: Callable[[], None] | None, tiers: Tiers) -> None:
    """Do what comes after the last read."""
    if save is not None:
        save()
    tiers.close()


def _learn_hashes(folder: ModelFolder) -> Callable[[], None] | None:
    """Let a folder without hashes learn them from its reads; return what saves them."""
    if folder.hashes is not None:
        return None
    learned = folder.hashes = LearnedHashes(folder)
    return learned.save
