"""Recorded choices that are not whole: places of choices that were dropped, or of null experts.

A recording has -1 in such a place. Weights are normalised over all choices of a token, so a replay
must know what was there. The router's own best choices fill the places. With the weights of the
recording these are the very choices that were dropped.

T tokens, K places, C candidates of a token.
"""

import torch
from torch import Tensor


def fill_places(given_TK: Tensor, candidates_TC: Tensor, k: int) -> Tensor:
    """Return ``given_TK`` with candidates in empty places, until each token has k choices.

    Places and candidates (-1 = none) are taken in their order. Candidates that were given are left
    out. Does not wait for the device.
    """
    is_empty_TK = given_TK < 0
    is_given_TC = (candidates_TC.unsqueeze(2) == given_TK.unsqueeze(1)).any(dim=2)
    is_left_out_TC = is_given_TC | (candidates_TC < 0)
    # A stable sort brings those that may be taken to the front, in order.
    order_TC = is_left_out_TC.to(torch.uint8).sort(dim=1, stable=True).indices
    ranked_TC = candidates_TC.masked_fill(is_left_out_TC, -1).gather(1, order_TC)
    missing_T1 = k - (~is_empty_TK).sum(dim=1, keepdim=True)
    turn_TK = is_empty_TK.cumsum(dim=1) - 1
    found_TK = ranked_TC.gather(1, turn_TK.clamp(min=0, max=ranked_TC.shape[1] - 1))
    takes_TK = is_empty_TK & (turn_TK < missing_T1) & (turn_TK < ranked_TC.shape[1])
    return torch.where(takes_TK, found_TK.to(given_TK.dtype), given_TK)
