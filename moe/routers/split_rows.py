"""Lines of a fixed number of choices, for routers whose tokens visit any number of experts.

Expert kernels and paths take ``[N, W]`` choices and reserve a line for each. A token with many
choices takes several lines and one without takes none. So a router that may choose all experts for
a few tokens costs memory for its choices only, and all ranks have the same W.

T tokens, K columns of the router, N lines, W choices of a line.
"""

import torch
from torch import Tensor


def split_rows(experts_TK: Tensor, weights_TK: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the token of each line ``[N]``, its experts ``[N, W]`` and their weights.

    Waits for the device, because N depends on the choices.
    """
    present_TK = experts_TK >= 0
    counts_T = present_TK.sum(dim=1)
    lines_T = (counts_T + width - 1) // width
    tokens_N = torch.arange(len(lines_T), device=lines_T.device).repeat_interleave(lines_T)
    first_T = lines_T.cumsum(0) - lines_T
    place_TK = present_TK.cumsum(dim=1) - 1
    line_R = (first_T.unsqueeze(1) + place_TK // width)[present_TK]
    column_R = (place_TK % width)[present_TK]
    shape = (len(tokens_N), width)
    experts_NW = experts_TK.new_full(shape, -1)
    experts_NW[line_R, column_R] = experts_TK[present_TK]
    weights_NW = weights_TK.new_zeros(shape).index_put((line_R, column_R), weights_TK[present_TK])
    return tokens_N, experts_NW, weights_NW


def mask_of(given_TK: Tensor, num_experts: int) -> Tensor:
    """Return which experts are given (-1 = none), bool ``[T, E]``."""
    columns_TK = torch.where(given_TK >= 0, given_TK, num_experts).long()
    mask = torch.zeros(len(given_TK), num_experts + 1, dtype=torch.bool, device=given_TK.device)
    return mask.scatter(1, columns_TK, True)[:, :num_experts]


def weights_of(given_TK: Tensor, weights_TE: Tensor) -> Tensor:
    """Return the weights of given experts (-1 = none), 0 for none."""
    weights_TK = weights_TE.gather(1, given_TK.clamp(min=0).long())
    return torch.where(given_TK >= 0, weights_TK, 0)


def renamed(experts_TK: Tensor, names_E: Tensor) -> Tensor:
    """Return the name of each expert, int32; -1 stays -1."""
    return torch.where(experts_TK >= 0, names_E[experts_TK.clamp(min=0).long()].int(), -1)


def choices_of(chosen_TE: Tensor, weights_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Return experts ``[T, K]`` (int32, -1 = none, in order of their ids) and weights of a mask.

    K is the largest number of choices of a token, at least 1.
    """
    columns = max(1, int(chosen_TE.sum(dim=1).max())) if len(chosen_TE) else 1
    # A stable sort of "not chosen" brings the chosen experts to the front in order.
    experts_TK = (~chosen_TE).to(torch.uint8).sort(dim=1, stable=True).indices[:, :columns]
    present_TK = chosen_TE.gather(1, experts_TK)
    weights_TK = torch.where(present_TK, weights_TE.gather(1, experts_TK), 0)
    return torch.where(present_TK, experts_TK, -1).int(), weights_TK
