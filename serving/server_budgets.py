"""Budgets of a server in bytes, and what they come to."""

from ..errors import ConfigError
from ..moe.folders.folder import ModelFolder
from ..moe.folders.hub import local_folder
from .experts.budget import AUTO, budget_bytes, count_in_pools, host_bytes
from .experts.copies import copies_bytes
from .experts.reading.choose import plan_reads
from .loading import pick_dtype
from .memory import available_bytes
from .planning.budget import Room, demand_of_server
from .planning.decide import decide
from .planning.sizes import sizes_of
from .planning.start import log_start
from .serve_args import ServeArgs


def with_budgets(args: ServeArgs) -> tuple[ServeArgs, Room | None]:
    """Return the arguments with budgets in bytes, and how memory was divided for ``auto``.

    ``auto`` is what this machine can spare. It is decided once, where the application is built, so
    that all replicas have as much. Where it keeps all experts in memory, there are none left for
    host memory.
    """
    if args.expert_memory != AUTO and args.host_memory is None:
        return args, None
    folder = ModelFolder(local_folder(args.model))
    try:
        dtype = pick_dtype(folder, args.dtype)
        host = host_bytes(folder, dtype, args.host_memory)
        copies = copies_bytes(args.store_options, dtype)
        demand = demand_of_server(
            args.max_num_seqs, args.max_model_len, args.most_replicas, host, copies
        )
        budget, room = decide(folder, dtype, args.expert_memory, demand, args.expert_reader)
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
    if budget is None:  # no expert is ever missing
        own |= {"expert_fallback": None, "expert_fallback_above": None}
    return args.model_copy(update=own), room


def log_budgets(args: ServeArgs, room: Room | None) -> None:
    """Log what a server on this machine starts with, if it has a budget."""
    if args.expert_memory is None and room is None:
        return
    folder = ModelFolder(local_folder(args.model))
    try:
        dtype = pick_dtype(folder, args.dtype)
        slots = reads = None
        if args.expert_memory is not None:
            num_bytes = budget_bytes(folder, dtype, args.expert_memory)
            slots = count_in_pools(folder, dtype, num_bytes)
            each = sizes_of(folder, dtype).bytes_of(slots)
            each += copies_bytes(args.store_options, dtype)
            free = max(0, available_bytes() - args.most_replicas * each)
            reads = plan_reads(folder, args.expert_reader, free)
        host = host_bytes(folder, dtype, args.host_memory)
        options = args.store_options
        log_start(folder, dtype, slots, reads, options, room, host, args.most_replicas)
    finally:
        folder.close()
