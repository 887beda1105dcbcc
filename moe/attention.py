"""Grouped-query attention of Qwen3: per-head q/k norm, then rotary embedding.

T tokens, D model width, Q query heads, G key/value heads, H head width, B sequences, L length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import causal_attention
from ..kernels.cpu.norm import rms_norm as cpp_rms_norm
from .batch import Batch, Packing
from .config import ModelConfig
from .kv_cache import KVCacheSpec, SequenceCache
from .linear import Linear

PAGE = 256
"""Positions whose cosines and sines are computed together."""


class Rope:
    """Rotary embedding with the half-split layout of Hugging Face's models (Su et al. 2021)."""

    def __init__(self, head_dim: int, theta: float) -> None:
        steps_h = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
        self.frequencies_h = theta ** (-steps_h / head_dim)
        self._known: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def tables(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, ``[T, 1, H]``, computed at least in fp32."""
        if not positions_T.is_cpu or positions_T.is_meta or not len(positions_T):
            return self._compute(positions_T, dtype)
        # Looked up: computing a few of them takes torch longer than the rest of a decode step.
        cos_P1H, sin_P1H = self._known.get(dtype, (positions_T[:0], positions_T[:0]))
        highest = int(positions_T.max())
        if highest >= len(cos_P1H):
            cos_P1H, sin_P1H = self._grow(highest, dtype)
        return cos_P1H.index_select(0, positions_T), sin_P1H.index_select(0, positions_T)

    @torch.inference_mode(False)  # for what is kept may be used in training later
    def _grow(self, highest: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # Page by page, so that a position's bits do not depend on what came before it; all of them
        # anew, so that two threads that do this at once do no harm.
        starts = range(0, 2 * highest + 1, PAGE)
        places = (torch.arange(start, start + PAGE, device="cpu") for start in starts)
        cosines, sines = zip(*(self._compute(place, dtype) for place in places), strict=True)
        tables = torch.cat(cosines), torch.cat(sines)
        self._known[dtype] = tables
        return tables

    def _compute(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        frequencies_h = self.frequencies_h.to(positions_T.device, wide)
        angles_Th = positions_T.to(wide).unsqueeze(-1) * frequencies_h
        angles_T1H = torch.cat([angles_Th, angles_Th], dim=-1).unsqueeze(1)
        return angles_T1H.cos().to(dtype), angles_T1H.sin().to(dtype)


def rotate(x_TQH: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Apply the rotary embedding to every head."""
    cos_T1H, sin_T1H = tables
    first, second = x_TQH.chunk(2, dim=-1)
    return x_TQH * cos_T1H + torch.cat([-second, first], dim=-1) * sin_T1H


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in fp32 inside like Hugging Face's."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return ``weight * x / rms(x)``."""
        if not torch.is_grad_enabled():
            normed = cpp_rms_norm(x, self.weight, self.eps)
            if normed is not None:
                return normed
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal attention over each sequence of a ragged batch."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.num_kv_heads = config.kv_heads
        self.head_dim = config.head_width
        d_model, width = config.d_model, config.head_width
        self.q_proj = Linear(d_model, config.num_heads * width)
        self.k_proj = Linear(d_model, config.kv_heads * width)
        self.v_proj = Linear(d_model, config.kv_heads * width)
        self.o_proj = Linear(config.num_heads * width, d_model)
        self.q_norm = RMSNorm(width, config.rms_eps)
        self.k_norm = RMSNorm(width, config.rms_eps)

    def cache_spec(self) -> KVCacheSpec:
        """Say what a cache must keep for this layer."""
        return KVCacheSpec(self.num_kv_heads, self.head_dim, self.k_proj.weight.dtype)

    def forward(self, x_TD: Tensor, batch: Batch, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Return the attention output, ``[T, D]``."""
        q_TQH = self.q_norm(self.q_proj(x_TD).unflatten(-1, (self.num_heads, self.head_dim)))
        k_TGH = self.k_norm(self.k_proj(x_TD).unflatten(-1, (self.num_kv_heads, self.head_dim)))
        v_TGH = self.v_proj(x_TD).unflatten(-1, (self.num_kv_heads, self.head_dim))
        q_TQH, k_TGH = rotate(q_TQH, rope), rotate(k_TGH, rope)
        if batch.caches is None and batch.is_uniform:
            out_TQH = self._uniform(q_TQH, k_TGH, v_TGH, batch.lengths[0])
        elif batch.packing is not None:
            out_TQH = self._packed(q_TQH, k_TGH, v_TGH, batch.packing)
        else:
            out_TQH = self._ragged(q_TQH, k_TGH, v_TGH, batch)
        out_TD: Tensor = self.o_proj(out_TQH.flatten(-2))
        return out_TD

    def _attend(
        self, q_BQLH: Tensor, k_BGLH: Tensor, v_BGLH: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        is_grouped = self.num_heads > self.num_kv_heads
        return F.scaled_dot_product_attention(
            q_BQLH, k_BGLH, v_BGLH, mask, is_causal=causal, enable_gqa=is_grouped
        )

    def _uniform(self, q_TQH: Tensor, k_TGH: Tensor, v_TGH: Tensor, length: int) -> Tensor:
        q, k, v = (t.unflatten(0, (-1, length)) for t in (q_TQH, k_TGH, v_TGH))
        if causal_attention.can_run(q):
            out_BLQH: Tensor = causal_attention.CausalAttention.apply(q, k, v)
            return out_BLQH.flatten(0, 1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self._attend(q, k, v, None, causal=True).transpose(1, 2).flatten(0, 1)

    def _packed(self, q_TQH: Tensor, k_TGH: Tensor, v_TGH: Tensor, packing: Packing) -> Tensor:
        sizes = [count * length for count, length in packing.groups]
        parts = (t.index_select(0, packing.rows_P).split(sizes) for t in (q_TQH, k_TGH, v_TGH))
        lengths = [length for _, length in packing.groups]
        out = [self._uniform(q, k, v, n) for q, k, v, n in zip(*parts, lengths, strict=True)]
        return torch.cat(out).index_select(0, packing.places_T)

    def _ragged(self, q_TQH: Tensor, k_TGH: Tensor, v_TGH: Tensor, batch: Batch) -> Tensor:
        # One call per sequence: padding would tie a sequence's bits to its neighbours' lengths.
        out = []
        parts = (t.split(batch.lengths) for t in (q_TQH, k_TGH, v_TGH))
        for index, (q_LQH, k_LGH, v_LGH) in enumerate(zip(*parts, strict=True)):
            cache = None if batch.caches is None else batch.caches[index]
            out.append(self._one_sequence(q_LQH, k_LGH, v_LGH, cache))
        return torch.cat(out) if out else q_TQH

    def _one_sequence(
        self, q_LQH: Tensor, k_LGH: Tensor, v_LGH: Tensor, cache: SequenceCache | None
    ) -> Tensor:
        q, k, v = (t.transpose(0, 1) for t in (q_LQH, k_LGH, v_LGH))
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.extend(self.layer, k, v)
        mask = None
        if past and q.shape[1] > 1:
            ahead = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
            mask = ahead.tril(diagonal=past).unsqueeze(0).unsqueeze(0)
        causal = past == 0 and q.shape[1] > 1
        out_BQLH = self._attend(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), mask, causal)
        return out_BQLH.squeeze(0).transpose(0, 1)
