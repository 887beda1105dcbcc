"""What the ``parallel`` section of a run asks of its model and its data."""

from ..moe.config.moe import MoEConfig
from .parallel_config import ParallelConfig


def problem_with_parallel(
    parallel: ParallelConfig,
    moe: MoEConfig | None,
    sequence_length: int | None,
    has_expert_lora: bool,
) -> str | None:
    """Return why experts or rows cannot be shared as the run says, or None.

    ``sequence_length`` is that of all sequences, None if they differ. ``has_expert_lora`` says
    whether experts get low-rank updates.
    """
    if parallel.expert_tp > 1:
        return _problem_with_slices(parallel.expert_tp, moe, has_expert_lora)
    if parallel.path == "padded" and moe is not None:
        return _problem_with_padding(moe, sequence_length)
    return None


def _problem_with_padding(moe: MoEConfig, sequence_length: int | None) -> str | None:
    """Return why the rows of a step cannot be padded to a router's capacity, or None."""
    if sequence_length is None:
        return (
            "parallel.path is padded, but sequences are documents or chats of any length, so the "
            "rows that an expert may take change from step to step; use all_to_all, or "
            "train.packing: none with text."
        )
    if moe.router.most_rows(sequence_length, moe.num_experts) is None:
        return (
            f"parallel.path is padded, but the {moe.router.kind} router does not limit the rows of "
            "an expert; give model.moe.router a capacity or use all_to_all."
        )
    return None


def _problem_with_slices(count: int, moe: MoEConfig | None, has_lora: bool) -> str | None:
    """Return why experts cannot be cut into ``count`` slices, or None."""
    given = f"parallel.expert_tp is {count}"
    if moe is None:
        return f"{given}, but the model has no experts; set it to 1 or give model.moe."
    if moe.d_expert % count:
        return (
            f"{given}, which does not divide model.moe.d_expert = {moe.d_expert}; choose a divisor "
            f"of {moe.d_expert}."
        )
    if moe.router.reads_gates:
        return (
            f"{given}, but {moe.router.kind} routers read whole experts; use another router or set "
            "expert_tp to 1."
        )
    if has_lora:
        return (
            f"{given}, but low-rank updates of experts are not cut into slices; set lora.targets "
            "to [attention] or expert_tp to 1."
        )
    return None
