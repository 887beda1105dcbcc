"""Budgets of a server in bytes, and what they come to."""

from ..errors import ConfigError
from ..moe.folders.folder import ModelFolder
from ..moe.folders.hub import local_folder
from .experts.budget import AUTO, host_bytes
from .loading import pick_dtype
from .planning.budget import demand_of_server
from .planning.decide import decide
from .server import ServeArgs


def with_budgets(args: ServeArgs) -> ServeArgs:
    """Return the arguments with budgets in bytes: ``auto`` is what this machine can spare.

    Decided once, where the application is built, so that all replicas have as much. Where ``auto``
    keeps all experts in memory, there are none left for host memory.
    """
    if args.expert_memory != AUTO and args.host_memory is None:
        return args
    folder = ModelFolder(local_folder(args.model))
    dtype = pick_dtype(folder, args.dtype)
    host = host_bytes(folder, dtype, args.host_memory)
    demand = demand_of_server(args.max_num_seqs, args.max_model_len, args.num_replicas, host)
    budget, _ = decide(folder, dtype, args.expert_memory, demand)
    folder.close()
    if host and budget is None:
        if args.expert_memory != AUTO:
            raise ConfigError(
                f"host-memory is {args.host_memory}, but without expert-memory all experts are in "
                "each replica's memory; set expert-memory, or leave host-memory out."
            )
        host = 0
    own = {"expert_memory": budget, "host_memory": f"{host}B" if host else None}
    return args.model_copy(update=own)
