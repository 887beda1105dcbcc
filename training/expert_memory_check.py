"""What ``train.expert_memory`` asks of the rest of a run."""

from ..moe.config.moe import MoEConfig
from .parallel_config import ParallelConfig


def problem_with_expert_memory(
    expert_memory: str,
    parameters: str,
    precision: str,
    moe: MoEConfig | None,
    has_start: bool,
    parallel: ParallelConfig,
) -> str | None:
    """Return why frozen experts cannot be read from their folder as the run says, or None.

    ``has_start`` says whether the run starts from a folder.
    """
    given = f"train.expert_memory is {expert_memory!r}"
    if parameters == "all":
        return (
            f"{given}, but train.parameters is all, and only frozen experts can be read from their "
            "folder; train lora or router, or leave expert_memory out."
        )
    if moe is None:
        return f"{given}, but the model has no experts; leave it out."
    if not has_start:
        return (
            f"{given}, but start_from names no folder to read the experts from; give one, or leave "
            "expert_memory out."
        )
    if moe.router.reads_gates:
        return (
            f"{given}, but {moe.router.kind} routers read the weights of all experts; use another "
            "router or leave expert_memory out."
        )
    if precision == "fp64":
        return f"{given}, but train.precision is fp64; use fp32 or bf16."
    shared = {"ep": parallel.ep, "expert_tp": parallel.expert_tp}
    for name, count in shared.items():
        if count > 1:
            return (
                f"{given}, but parallel.{name} is {count}, which shares out experts that are in "
                f"memory; set {name} to 1, and each rank reads the experts that it needs."
            )
    if parallel.dense == "deepspeed":
        return f"{given}, but parallel.dense is deepspeed, which does not know it; use ddp or fsdp."
    return None
