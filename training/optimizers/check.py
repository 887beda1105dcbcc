"""What an ``optimizer`` section asks of the rest of a run."""

from ..parallel_config import ParallelConfig
from .muon import MuonConfig
from .table import AnyOptimizer


def problem_with_optimizer(
    config: AnyOptimizer, parallel: ParallelConfig, parameters: str, trains_experts: bool
) -> str | None:
    """Return why a run cannot be optimized as it says, or None.

    ``parameters`` are those of ``train.parameters``. ``trains_experts`` says whether experts, or
    their low-rank updates, are among them.
    """
    if config.kind != "adamw" and parameters != "all":
        return (
            f"optimizer.kind is {config.kind}, but train.parameters is {parameters}, and none of "
            f"those is a matrix that {config.kind} updates; use adamw or train all."
        )
    if config.kind != "adamw" and parallel.dense == "deepspeed":
        return (
            f"optimizer.kind is {config.kind}, which needs whole rows of a matrix, but "
            "parallel.dense is deepspeed, which splits parameters at any number; use fsdp, or "
            "adamw."
        )
    if isinstance(config, MuonConfig) and parallel.expert_tp > 1:
        return (
            f"optimizer.kind is muon, which needs whole matrices, but parallel.expert_tp is "
            f"{parallel.expert_tp} and cuts those of experts; use frugal or adamw, or set "
            "expert_tp to 1."
        )
    if not config.shard_experts:
        return None
    if not trains_experts:
        return (
            "optimizer.shard_experts is true, but no experts train, so there is nothing to share "
            "out; leave it out."
        )
    if parallel.copies is not None:
        return (
            "optimizer.shard_experts is true, but parallel.copies moves experts and their whole "
            "state between ranks; leave one of them out."
        )
    return None
