"""Multi-head latent attention (DeepSeek-V2, section 2.1): narrow latents of queries, keys, values.

T tokens, D model width, Q heads, C latent width (``kv_rank``), R rotated part of a head, N part
without position, V value width, L rows of one sequence, S positions.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ...kernels.attention import NewRows, attend_cached
from ...kernels.grouped_linear import Span, grouped_linear, grouped_transposed
from ..adapters.rows import AdapterRows
from ..batch import Batch
from ..config.model import ModelConfig
from ..kv_cache import KVCache, KVCacheSpec
from ..linear import Linear
from ..norm import RMSNorm
from .attend import AttentionRule, attend, attend_heads
from .rope import Tables, rotate, softmax_scale

Product = Callable[[Tensor, Tensor, list[Span]], Tensor]

LATENT_EPS = 1e-6
"""Epsilon of the norms of latents, for every epsilon of the model's norms (as in Hugging Face)."""


class LatentAttention(nn.Module):
    """Causal latent attention; a cache keeps ``C + R`` numbers per position, for all heads.

    Without a cache, keys and values are expanded. With a cache, queries and outputs are multiplied
    by the expansion instead, so that a step reads the narrow rows only.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        latent = config.attention.latent
        assert latent is not None, "the configuration asks for grouped-query attention"
        self.layer = layer
        self.num_heads = config.num_heads
        self.latent = latent
        self.interleaved = config.attention.rope_interleaved
        self.rule = AttentionRule(softmax_scale(config))
        widths = (latent.kv_rank, latent.nope_dim, latent.rope_dim, latent.v_dim)
        self.fits_kernels = all(width % 2 == 0 for width in widths)
        """Whether the C++ kernels run with a cache: they multiply in pairs."""
        d_model, has_bias = config.d_model, config.attention.qkv_bias
        q_width = self.num_heads * (latent.nope_dim + latent.rope_dim)
        if latent.q_rank is None:
            self.q_proj = Linear(d_model, q_width)
        else:
            self.q_a_proj = Linear(d_model, latent.q_rank, has_bias)
            self.q_a_layernorm = RMSNorm(latent.q_rank, LATENT_EPS)
            self.q_b_proj = Linear(latent.q_rank, q_width)
        self.kv_a_proj_with_mqa = Linear(d_model, latent.kv_rank + latent.rope_dim, has_bias)
        self.kv_a_layernorm = RMSNorm(latent.kv_rank, LATENT_EPS)
        kv_width = self.num_heads * (latent.nope_dim + latent.v_dim)
        self.kv_b_proj = Linear(latent.kv_rank, kv_width)
        self.o_proj = Linear(self.num_heads * latent.v_dim, d_model, config.attention.o_bias)

    def cache_spec(self) -> KVCacheSpec:
        """Say what a cache must keep for this layer: latents, whose first part is the value."""
        width = self.latent.kv_rank + self.latent.rope_dim
        return KVCacheSpec(1, width, 0, self.kv_b_proj.weight.dtype)

    def forward(
        self, x_TD: Tensor, batch: Batch, rope: Tables, new: NewRows | None = None
    ) -> Tensor:
        """Return the attention output, ``[T, D]``; ``new`` as in :class:`.parts.Part`."""
        q_TQN, q_TQR = self._queries(x_TD, batch.adapters, rope)
        c_TC, k_TR = self.kv_a_proj_with_mqa(x_TD, batch.adapters).split(
            [self.latent.kv_rank, self.latent.rope_dim], dim=-1
        )
        c_TC = self.kv_a_layernorm(c_TC)
        k_T1R = rotate(k_TR.unsqueeze(1), rope, self.interleaved)
        if batch.caches is None:
            out_TQV = self._expanded(q_TQN, q_TQR, c_TC, k_T1R, batch)
        elif new is not None and self.fits_kernels:
            rows_T1P = torch.cat([c_TC.unsqueeze(1), k_T1R], dim=-1)
            out_TQV = self._rows_cached(q_TQN, q_TQR, rows_T1P, batch, new)
        else:
            parts = (t.split(batch.lengths) for t in (q_TQN, q_TQR, c_TC, k_T1R))
            sequences = zip(*parts, batch.caches, self._expansions(batch), strict=True)
            out_TQV = torch.cat([self._one_cached(*sequence) for sequence in sequences])
        out_TD: Tensor = self.o_proj(out_TQV.flatten(-2), batch.adapters)
        return out_TD

    def _queries(
        self, x_TD: Tensor, adapters: AdapterRows | None, rope: Tables
    ) -> tuple[Tensor, Tensor]:
        latent = self.latent
        if latent.q_rank is None:
            q_TP = self.q_proj(x_TD, adapters)
        else:
            q_a_TP = self.q_a_layernorm(self.q_a_proj(x_TD, adapters))
            q_TP = self.q_b_proj(q_a_TP, adapters)
        q_TQH = q_TP.unflatten(-1, (self.num_heads, latent.nope_dim + latent.rope_dim))
        q_TQN, q_TQR = q_TQH.split([latent.nope_dim, latent.rope_dim], dim=-1)
        return q_TQN, rotate(q_TQR, rope, self.interleaved)

    def _expanded(
        self, q_TQN: Tensor, q_TQR: Tensor, c_TC: Tensor, k_T1R: Tensor, batch: Batch
    ) -> Tensor:
        latent = self.latent
        kv_TQP = self.kv_b_proj(c_TC, batch.adapters).unflatten(-1, (self.num_heads, -1))
        k_TQN, v_TQV = kv_TQP.split([latent.nope_dim, latent.v_dim], dim=-1)
        k_TQH = torch.cat([k_TQN, k_T1R.expand(-1, self.num_heads, -1)], dim=-1)
        q_TQH = torch.cat([q_TQN, q_TQR], dim=-1)
        return attend(q_TQH, k_TQH, v_TQV, batch, self.rule, self.layer)

    def _expansions(self, batch: Batch) -> list[Tensor]:
        """Return each sequence's weight of ``kv_b_proj``, with its adapter's update added."""
        weights = []
        for sequence in range(len(batch.lengths)):
            weight = self.kv_b_proj.weight
            adapters = batch.adapters
            update = None if adapters is None else adapters.update(sequence, self.kv_b_proj)
            weights.append(weight if update is None else weight + update.b_OP @ update.a_PI)
        return weights

    def _rows_cached(
        self, q_TQN: Tensor, q_TQR: Tensor, rows_T1P: Tensor, batch: Batch, new: NewRows
    ) -> Tensor:
        """Do the same as below for all sequences, with bits that depend on no other new row."""
        q_TQC = self._by_head(grouped_transposed, q_TQN, batch, "keys")
        q_TQP = torch.cat([q_TQC, q_TQR], dim=-1)
        mixed_TQC = attend_cached(
            q_TQP,
            rows_T1P,
            None,
            new,
            self.layer,
            scale=self.rule.scale,
            value_width=self.latent.kv_rank,
        )
        assert mixed_TQC is not None, "parts.py asked whether the kernels take these rows"
        return self._by_head(grouped_linear, mixed_TQC, batch, "values")

    def _by_head(
        self, product: Product, x_TQI: Tensor, batch: Batch, part: Literal["keys", "values"]
    ) -> Tensor:
        """Multiply each head's rows with the head's matrix of keys or values, ``[T, Q, O]``."""
        lengths, expansions = list(batch.lengths), self._expansions(batch)
        if all(expansion is self.kv_b_proj.weight for expansion in expansions):
            lengths, expansions = [len(x_TQI)], expansions[:1]
        out = []
        for x_LQI, expansion_PC in zip(x_TQI.split(lengths), expansions, strict=True):
            expand_QPC = expansion_PC.unflatten(0, (self.num_heads, -1))
            keys_QNC, values_QVC = expand_QPC.split([self.latent.nope_dim, self.latent.v_dim], 1)
            length = len(x_LQI)
            spans = [
                Span(head, head * length, (head + 1) * length) for head in range(self.num_heads)
            ]
            rows_NI = x_LQI.transpose(0, 1).flatten(0, 1)
            y_NO = product(rows_NI, keys_QNC if part == "keys" else values_QVC, spans)
            out.append(y_NO.unflatten(0, (self.num_heads, length)).transpose(0, 1))
        return torch.cat(out)

    def _one_cached(
        self,
        q_LQN: Tensor,
        q_LQR: Tensor,
        c_LC: Tensor,
        k_L1R: Tensor,
        cache: KVCache,
        expansion_PC: Tensor,
    ) -> Tensor:
        """Attend to latents as they are in the cache: one key head for all query heads."""
        latent, past = self.latent, cache.length
        rows_1LP = torch.cat([c_LC, k_L1R.squeeze(1)], dim=-1).unsqueeze(0)
        cache.append(self.layer, rows_1LP, rows_1LP[..., :0])
        rows_1SP, _ = cache.view(self.layer, past + rows_1LP.shape[1])
        expand_QPC = expansion_PC.unflatten(0, (self.num_heads, -1))
        keys_QNC, values_QVC = expand_QPC.split([latent.nope_dim, latent.v_dim], dim=1)
        q_QLC = torch.bmm(q_LQN.transpose(0, 1), keys_QNC)
        q_QLP = torch.cat([q_QLC, q_LQR.transpose(0, 1)], dim=-1)
        keys, values = rows_1SP.unsqueeze(0), rows_1SP[..., : latent.kv_rank].unsqueeze(0)
        mixed_QLC = attend_heads(q_QLP.unsqueeze(0), keys, values, self.rule, past).squeeze(0)
        return torch.bmm(mixed_QLC, values_QVC.mT).transpose(0, 1)
