"""Budgets of a server in bytes, and what they come to."""

from dataclasses import replace

from ..errors import ConfigError
from ..moe.folders.folder import ModelFolder
from ..moe.folders.hub import local_folder
from ..moe.routers.own_code import allow
from .experts.budget import AUTO, budget_bytes, count_in_pools, host_bytes
from .experts.copies import copies_bytes
from .experts.reading.choose import plan_reads
from .hosting import check_served
from .loading import pick_dtype
from .memory import available_bytes
from .planning.budget import Room, demand_of_server
from .planning.decide import decide
from .planning.kv import asked_kv_bytes, describe_kv, free_kv_bytes
from .planning.sizes import sizes_of
from .planning.start import log_kv, log_lossy, log_start
from .serve_args import ServeArgs


def with_budgets(args: ServeArgs) -> tuple[ServeArgs, Room | None]:
    """Return the arguments with budgets in bytes, and how memory was divided for ``auto``.

    ``auto``, and what is left for keys and values, are what this machine can spare. They are
    decided once, where the application is built, so that all replicas have as much. Where all
    experts are in memory, there are none left for host memory.
    """
    allow(args.allow_code)
    folder = ModelFolder(local_folder(args.model))
    try:
        check_served(folder)
        dtype = pick_dtype(folder, args.dtype)
        host = host_bytes(folder, dtype, args.host_memory)
        copies = copies_bytes(args.store_options, dtype)
        demand = demand_of_server(
            *(args.max_num_seqs, args.max_model_len, args.most_replicas),
            *(host, copies, args.kv_dtype),
        )
        demand = replace(demand, kv_bytes=asked_kv_bytes(folder, dtype, args.kv_memory, demand))
        budget, room = decide(folder, dtype, args.expert_memory, demand, args.expert_reader)
        if budget is None:
            demand = replace(demand, copies_bytes=0)
        kv = demand.kv_bytes
        if kv is None and folder.config.generates:
            kv = free_kv_bytes(folder, dtype, budget, demand, available_bytes())
    finally:
        folder.close()
    if host and budget is None:
        if args.expert_memory != AUTO:
            raise ConfigError(
                f"host-memory is {args.host_memory}, but without expert-memory all experts are in "
                "each replica's memory; set expert-memory, or leave host-memory out."
            )
        host = 0
    own: dict[str, object] = {"expert_memory": budget, "host_memory": f"{host}B" if host else None}
    if kv is not None:
        own["kv_memory"] = f"{kv}B"
    if budget is None:  # no expert is ever missing
        own |= {"expert_fallback": None, "expert_fallback_above": None}
    return args.model_copy(update=own), room


def log_budgets(args: ServeArgs, room: Room | None) -> None:
    """Log what a server on this machine starts with, about experts only if they have a budget."""
    folder = ModelFolder(local_folder(args.model))
    try:
        dtype = pick_dtype(folder, args.dtype)
        demand = demand_of_server(
            *(args.max_num_seqs, args.max_model_len, args.most_replicas),
            *(0, 0, args.kv_dtype),
        )
        kv = asked_kv_bytes(folder, dtype, args.kv_memory, demand)
        if kv is not None:
            log_kv(describe_kv(folder, dtype, kv, demand))
        if args.expert_memory is None and room is None:
            log_lossy(folder, dtype, args.store_options)
            return
        slots = reads = None
        if args.expert_memory is not None:
            num_bytes = budget_bytes(folder, dtype, args.expert_memory)
            slots = count_in_pools(folder, dtype, num_bytes)
            each = sizes_of(folder, dtype).bytes_of(slots)
            each += copies_bytes(args.store_options, dtype) + (kv or 0)
            free = max(0, available_bytes() - args.most_replicas * each)
            reads = plan_reads(folder, args.expert_reader, free)
        host = host_bytes(folder, dtype, args.host_memory)
        options = args.store_options
        log_start(folder, dtype, slots, reads, options, room, host, args.most_replicas)
    finally:
        folder.close()
