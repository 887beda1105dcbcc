"""Order routed rows by expert.

T tokens, K choices per token, R = T*K routed rows (row t*K + k is choice k of token t), E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grouping:
    """Routed rows in expert order, built on the device without a host synchronisation."""

    order_R: Tensor
    """int64 ``[R]``: routed rows sorted by expert, stably; rows without an expert come last."""
    inverse_R: Tensor
    """int64 ``[R]``: the position of each routed row in ``order_R``."""
    offsets_E1: Tensor
    """int32 ``[E + 1]``: expert e owns ``order_R[offsets[e] : offsets[e + 1]]``."""
    num_choices: int
    """K."""

    @property
    def tokens_R(self) -> Tensor:
        """int64 ``[R]``: the token of each row of ``order_R``."""
        return self.order_R // self.num_choices

    def counts_E(self) -> Tensor:
        """int32 ``[E]``: rows of each expert."""
        return self.offsets_E1.diff()


def group_tokens(experts_TK: Tensor, num_experts: int) -> Grouping:
    """Group the rows of ``experts_TK`` (int, -1 = no expert) by expert.

    Ids outside ``[-1, num_experts)`` raise ``ValueError`` on the CPU, where the check needs no
    synchronisation; on other devices they count as -1.
    """
    if experts_TK.ndim != 2:
        raise ValueError(f"experts has shape {tuple(experts_TK.shape)}; it must be [T, K].")
    ids_R = experts_TK.reshape(-1)
    outside_R = (ids_R < 0) | (ids_R >= num_experts)
    if ids_R.device.type == "cpu" and bool((outside_R & (ids_R != -1)).any()):
        worst = int(ids_R[outside_R & (ids_R != -1)][0])
        raise ValueError(outside(worst, num_experts))
    # Rows without an expert sort after the last expert.
    keys_R = torch.where(outside_R, num_experts, ids_R)
    sorted_R, order_R = keys_R.sort(stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    bounds_E1 = torch.arange(num_experts + 1, device=ids_R.device, dtype=sorted_R.dtype)
    offsets_E1 = torch.searchsorted(sorted_R, bounds_E1, out_int32=True)
    return Grouping(order_R, inverse_R, offsets_E1, experts_TK.shape[1])


def outside(expert: int, num_experts: int) -> str:
    """Return the error message for an invalid expert id."""
    return f"expert id {expert} is outside [-1, {num_experts}); use -1 for rows without an expert."
