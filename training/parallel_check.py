"""What the ``parallel`` section of a run asks of its model and its data."""

from ..moe.config.model import MoEConfig


def problem_with_padding(moe: MoEConfig, sequence_length: int, has_windows: bool) -> str | None:
    """Return why the rows of a step cannot be padded to a router's capacity, or None.

    ``has_windows`` says whether all sequences have ``sequence_length`` tokens.
    """
    if not has_windows:
        return (
            "parallel.path is padded, but sequences are documents or chats of any length, so the "
            "rows that an expert may take change from step to step; use all_to_all, or "
            "train.packing: none with text."
        )
    router = moe.router
    if router.most_rows(sequence_length, moe.num_experts) is None:
        return (
            f"parallel.path is padded, but the {router.kind} router does not limit the rows of an "
            "expert; give model.moe.router a capacity or use all_to_all."
        )
    return None
