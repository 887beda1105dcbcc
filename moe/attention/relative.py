"""Attention of an encoder-decoder: unscaled scores plus a bias for each distance (T5's).

T rows, D model width, Q heads, H head width, B sequences of padded length L, S keys.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linear import Linear
from .grid import Grid


class KeysValues(NamedTuple):
    """What queries meet."""

    k_BQSH: Tensor
    v_BQSH: Tensor


class Meeting(NamedTuple):
    """Which rows of a batch meet, made once for all layers of a stack."""

    grid: Grid
    """Of the queries."""
    mask: Tensor | None
    """Added to scores, shaped like ``[B, Q, L, S]`` or broadcast to it; ``-inf`` hides a key.
    None = every query sees every key."""


class RelativeAttention(nn.Module):
    """Multi-head attention without biases; scores are not divided by ``sqrt(H)``.

    T5 puts that factor into the first values of ``q_proj`` instead.
    """

    def __init__(self, d_model: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = Linear(d_model, num_heads * head_dim)
        self.k_proj = Linear(d_model, num_heads * head_dim)
        self.v_proj = Linear(d_model, num_heads * head_dim)
        self.o_proj = Linear(num_heads * head_dim, d_model)

    def keys_values(self, x_TD: Tensor, grid: Grid) -> KeysValues:
        """Return keys and values of rows."""
        return KeysValues(
            self._heads(self.k_proj(x_TD), grid), self._heads(self.v_proj(x_TD), grid)
        )

    def forward(self, x_TD: Tensor, meeting: Meeting, met: KeysValues) -> Tensor:
        """Return the attention output of rows, ``[T, D]``; ``met`` are the keys and values."""
        q_BQLH = self._heads(self.q_proj(x_TD), meeting.grid)
        mask = None if meeting.mask is None else meeting.mask.to(q_BQLH.dtype)
        out_BQLH = F.scaled_dot_product_attention(q_BQLH, *met, mask, scale=1.0)
        out_TD: Tensor = self.o_proj(meeting.grid.collect(out_BQLH.transpose(1, 2)).flatten(-2))
        return out_TD

    def _heads(self, x_TN: Tensor, grid: Grid) -> Tensor:
        return grid.spread(x_TN.unflatten(-1, (self.num_heads, -1))).transpose(1, 2)


def hide_padding(bias: Tensor | None, is_real_BS: Tensor | None, like: Tensor) -> Tensor | None:
    """Return what is added to scores: ``bias`` where there is one, and ``-inf`` at padding."""
    if is_real_BS is None:
        return bias
    hidden_B11S = torch.zeros(is_real_BS.shape, dtype=like.dtype, device=like.device)
    hidden_B11S = hidden_B11S.masked_fill(~is_real_BS, -torch.inf)[:, None, None]
    return hidden_B11S if bias is None else bias + hidden_B11S
