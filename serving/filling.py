"""Build a model of a folder and fill it: all experts in memory, or behind a store."""

from typing import NamedTuple

import torch

from ..moe.folders.folder import ModelFolder
from ..moe.folders.read_weights import WeightRead, dense_reads, expert_reads, run_reads
from ..moe.models.model import Model
from ..moe.models.options import ModelOptions
from ..moe.models.table import build_model
from ..moe.without_memory import without_memory
from .experts.budget import budget_bytes
from .experts.copies import copies_bytes, open_fallback
from .experts.core_mode import use_core_channels
from .experts.fallback import Fallback
from .experts.forwards import announce_forwards, announce_inputs
from .experts.offloaded import OffloadedExperts
from .experts.opening import open_store
from .experts.options import StoreOptions
from .experts.predictors.next_gates import NextGates
from .experts.predictors.table import facts_of, open_predictor
from .experts.sparsity import Sparsity, open_sparsity, owner_of
from .experts.store import ExpertStore
from .memory import available_bytes, check_memory
from .planning.budget import Demand
from .planning.decide import decide
from .planning.start import log_lossy, log_start
from .resident import resident_experts


class Filled(NamedTuple):
    """A model with its weights."""

    model: Model
    store: ExpertStore | None
    """What reads the experts; None if all are in memory."""
    fallback: Fallback | None
    """Copies in fewer bits, for missing experts; None if there are none."""


def fill_model(
    files: ModelFolder,
    dtype: torch.dtype,
    expert_memory: str | None,
    options: StoreOptions,
    device: torch.device,
) -> Filled:
    """Return the model of an open folder in ``dtype`` on ``device``, within ``expert_memory``.

    Raises :class:`ConfigError` for budgets and options that do not fit the model or the machine.
    """
    asked = expert_memory
    copies = copies_bytes(options, dtype)
    demand = Demand(copies_bytes=copies)
    expert_memory, room = decide(files, dtype, asked, demand, options.reader)
    sharding = options.sharding
    if sharding is not None:
        expert_memory = sharding.start(files, dtype, expert_memory)
    if expert_memory is None:  # nothing is ever missing
        options, copies = options.without_copies(), 0
    check_memory(files, dtype, expert_memory, copies_bytes=copies)
    with without_memory():
        model = build_model(files.config, ModelOptions(expert_ids=()))
    store, fallback, sparsity = None, None, open_sparsity(files, options.sparsity)
    use_core_channels(model, sparsity)
    if expert_memory is not None:
        num_bytes = budget_bytes(files, dtype, expert_memory)
        store = open_store(files, dtype, num_bytes, options=options, free_bytes=available_bytes())
        announce_forwards(model, store.begin)
        fallback = open_fallback(store, files, dtype, options)
    reads = _attach_experts(files, model, dtype, store, sparsity, fallback)
    run_reads(files, [*dense_reads(files, model, dtype), *reads])
    if sharding is not None and store is not None:
        sharding.attach(model, store, files, dtype)
    if sparsity is not None and sparsity.owner is not None:
        sparsity.check_owner(owner_of(model))
    if store is not None:
        predictor = open_predictor(options.predictor, model)
        if predictor is not None:
            store.predict(predictor, facts_of(files.config))
            if isinstance(predictor, NextGates) and predictor.reads_input:
                announce_inputs(model, store.start)
    if asked is not None:
        slots = None if store is None else store.pools.num_slots
        plan = None if store is None else store.read_plan
        log_start(files, dtype, slots, plan, options, room)
    else:
        log_lossy(files, dtype, options)
    if device.type != "cpu":
        model.to(device)
    return Filled(model, store, fallback)


def _attach_experts(
    files: ModelFolder,
    model: Model,
    dtype: torch.dtype,
    store: ExpertStore | None,
    sparsity: Sparsity | None,
    fallback: Fallback | None,
) -> list[WeightRead]:
    """Give every MoE layer its experts, and return the reads that fill those in memory."""
    reads: list[WeightRead] = []
    moe_layers = model.moe_layers()
    for index, layer in moe_layers:
        limits = None
        if sparsity is not None:
            limits = sparsity.limits(index, layer.d_model, layer.d_expert)
        if store is not None:
            where = (index, layer.num_experts, len(moe_layers))
            layer.experts = OffloadedExperts(store, *where, limits, fallback)
        else:
            layer.experts, views = resident_experts(files, index, dtype, sparsity, limits)
            reads += expert_reads(files, index, views)
    return reads
