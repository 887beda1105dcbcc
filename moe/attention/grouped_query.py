"""Grouped-query attention and its variants: norms, biases, windows, sinks, positions.

T tokens, D model width, Q query heads, G key/value heads, H head width.
"""

import torch
from torch import Tensor, nn

from ...kernels.attention import NewRows
from ..batch import Batch
from ..config.model import ModelConfig
from ..kv_cache import KVCacheSpec
from ..linear import Linear
from ..norm import RMSNorm
from .attend import AttentionRule, attend
from .rope import Tables, rotate, softmax_scale


class Attention(nn.Module):
    """Causal attention over each sequence of a ragged batch; see :class:`AttentionConfig`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        attention = config.attention
        self.layer = layer
        self.num_heads = config.num_heads
        self.num_kv_heads = config.kv_heads
        self.head_dim = config.head_width
        self.window = attention.layer_window(layer)
        self.uses_rope = layer not in attention.nope_layers
        self.interleaved = attention.rope_interleaved
        self.clip = attention.clip_qkv
        self.scale = softmax_scale(config)
        self.fits_kernels = self.head_dim % 2 == 0
        """Whether the C++ kernels run with a cache: they multiply in pairs."""
        d_model, has_bias = config.d_model, attention.qkv_bias
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(d_model, q_width, has_bias)
        self.k_proj = Linear(d_model, kv_width, has_bias)
        self.v_proj = Linear(d_model, kv_width, has_bias)
        self.o_proj = Linear(q_width, d_model, attention.o_bias)
        self.q_norm, self.k_norm = None, None
        if attention.qk_norm is not None:
            is_per_head = attention.qk_norm == "head"
            self.q_norm = RMSNorm(self.head_dim if is_per_head else q_width, config.rms_eps)
            self.k_norm = RMSNorm(self.head_dim if is_per_head else kv_width, config.rms_eps)
        self.sinks = nn.Parameter(torch.zeros(self.num_heads)) if attention.sinks else None

    def cache_spec(self) -> KVCacheSpec:
        """Say what a cache must keep for this layer."""
        width = self.head_dim
        return KVCacheSpec(self.num_kv_heads, width, width, self.k_proj.weight.dtype)

    def forward(
        self, x_TD: Tensor, batch: Batch, rope: Tables, new: NewRows | None = None
    ) -> Tensor:
        """Return the attention output, ``[T, D]``; ``new`` as in :class:`.parts.Part`."""
        q_TQH = self._heads(self.q_proj(x_TD, batch.adapters), self.q_norm, self.num_heads)
        k_TGH = self._heads(self.k_proj(x_TD, batch.adapters), self.k_norm, self.num_kv_heads)
        v_TGH = self._heads(self.v_proj(x_TD, batch.adapters), None, self.num_kv_heads)
        if self.uses_rope:
            q_TQH = rotate(q_TQH, rope, self.interleaved)
            k_TGH = rotate(k_TGH, rope, self.interleaved)
        rule = AttentionRule(self.scale, self.window, self.sinks)
        out_TQH = attend(q_TQH, k_TGH, v_TGH, batch, rule, self.layer, new)
        out_TD: Tensor = self.o_proj(out_TQH.flatten(-2), batch.adapters)
        return out_TD

    def _heads(self, x_TP: Tensor, norm: RMSNorm | None, num_heads: int) -> Tensor:
        """Split a projection into heads, ``[T, heads, H]``, normed and clipped."""
        if norm is not None and norm.width == x_TP.shape[-1]:
            x_TP, norm = norm(x_TP), None  # over all heads together
        x_TNH = x_TP.unflatten(-1, (num_heads, self.head_dim))
        if norm is not None:
            x_TNH = norm(x_TNH)
        return x_TNH if self.clip is None else x_TNH.clamp(-self.clip, self.clip)
