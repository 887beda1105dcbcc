"""Softmax attention inside each sequence of a batch: causal, in a window, with sinks.

T tokens, Q query heads, G key/value heads, H head width, V value width, B sequences of length L,
S keys.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.attention import NewRows, attend_cached, attend_causally
from ..batch import Batch, Packing
from ..kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """Which keys a query sees, and how scores become probabilities."""

    scale: float
    """Factor on scores."""
    window: int | None = None
    """Positions a query sees, its own included; None = all before it."""
    sinks_Q: Tensor | None = None
    """A logit per query head that takes probability but has no value (gpt-oss)."""


def attend(
    q_TQH: Tensor,
    k_TGH: Tensor,
    v_TGV: Tensor,
    batch: Batch,
    rule: AttentionRule,
    layer: int,
    new: NewRows | None = None,
) -> Tensor:
    """Return each row's attention over its own sequence, ``[T, Q, V]``.

    Caches, if the batch has any, receive the new keys and values of ``layer``. ``new`` are those
    caches for the C++ kernels, where a row's bits do not depend on the rows that are new with it.
    """
    if new is not None:
        found = attend_cached(
            q_TQH,
            k_TGH,
            v_TGV,
            new,
            layer,
            scale=rule.scale,
            window=rule.window,
            sinks_Q=rule.sinks_Q,
        )
        if found is not None:
            return found
    if batch.caches is None and batch.is_uniform:
        return _uniform(q_TQH, k_TGH, v_TGV, batch.lengths[0], rule)
    if batch.packing is not None:
        return _packed(q_TQH, k_TGH, v_TGV, batch.packing, rule)
    # One call per sequence: with padding, a sequence's bits would depend on the other lengths.
    out = []
    parts = (t.split(batch.lengths) for t in (q_TQH, k_TGH, v_TGV))
    for index, (q_LQH, k_LGH, v_LGV) in enumerate(zip(*parts, strict=True)):
        cache = None if batch.caches is None else batch.caches[index]
        out.append(_one_sequence(q_LQH, k_LGH, v_LGV, cache, rule, layer))
    return torch.cat(out) if out else q_TQH[..., :1].expand(-1, -1, v_TGV.shape[-1])


def attend_heads(
    q_BQLH: Tensor, k_BGSH: Tensor, v_BGSV: Tensor, rule: AttentionRule, past: int = 0
) -> Tensor:
    """Return ``[B, Q, L, V]``: queries at positions ``past`` and on, keys at 0 to S = past + L."""
    length, window = q_BQLH.shape[2], rule.window
    if window is not None and k_BGSH.shape[2] > window + length - 1:
        unseen = k_BGSH.shape[2] - (window + length - 1)
        k_BGSH, v_BGSV, past = k_BGSH[:, :, unseen:], v_BGSV[:, :, unseen:], past - unseen
    num_keys, mask = k_BGSH.shape[2], None
    hides_old = window is not None and num_keys > window
    if rule.sinks_Q is not None or (length > 1 and (past or hides_old)):
        mask = _visible(length, num_keys, past, window, q_BQLH.device)
    if rule.sinks_Q is not None:
        assert mask is not None
        k_BGSH, v_BGSV, mask = _with_sinks(k_BGSH, v_BGSV, mask, rule.sinks_Q.to(q_BQLH.dtype))
    heads = q_BQLH.shape[1] // k_BGSH.shape[1]
    if heads > 1 and _needs_equal_heads(q_BQLH, mask):
        k_BGSH, v_BGSV = (t.repeat_interleave(heads, dim=1) for t in (k_BGSH, v_BGSV))
    return F.scaled_dot_product_attention(
        q_BQLH,
        k_BGSH,
        v_BGSV,
        mask,
        is_causal=mask is None and length > 1,
        scale=rule.scale,
        enable_gqa=q_BQLH.shape[1] > k_BGSH.shape[1],
    )


def _needs_equal_heads(q_BQLH: Tensor, mask: Tensor | None) -> bool:
    """Say whether only copies of keys and values reach a fast kernel of a GPU.

    Flash attention takes groups of heads, but no mask and no fp32. The memory-efficient kernel
    takes both, but no groups. Where neither runs, torch writes all scores, ``[B, Q, L, S]`` in
    fp32, to memory.
    """
    return q_BQLH.is_cuda and (mask is not None or q_BQLH.dtype == torch.float32)


def _visible(
    length: int, num_keys: int, past: int, window: int | None, device: torch.device
) -> Tensor:
    """Return bool ``[1, 1, L, S]``: True where a query sees a key."""
    seen_LS = torch.ones(length, num_keys, dtype=torch.bool, device=device).tril(past)
    if window is not None:
        seen_LS = seen_LS.triu(past - window + 1)
    return seen_LS.unsqueeze(0).unsqueeze(0)


def _with_sinks(
    k_BGSH: Tensor, v_BGSV: Tensor, seen_11LS: Tensor, sinks_Q: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a key and a value of zeros, whose score the mask makes the sink's logit."""
    k_BGSH, v_BGSV = (F.pad(t, (0, 0, 0, 1)) for t in (k_BGSH, v_BGSV))
    hidden_11LS = torch.zeros_like(seen_11LS, dtype=sinks_Q.dtype).masked_fill(
        ~seen_11LS, -torch.inf
    )
    _, _, length, num_keys = seen_11LS.shape
    sinks_1QL1 = sinks_Q.view(1, -1, 1, 1).expand(1, -1, length, 1)
    hidden_1QLS = hidden_11LS.expand(1, len(sinks_Q), length, num_keys)
    return k_BGSH, v_BGSV, torch.cat([hidden_1QLS, sinks_1QL1], dim=-1)


def _uniform(
    q_TQH: Tensor, k_TGH: Tensor, v_TGV: Tensor, length: int, rule: AttentionRule
) -> Tensor:
    q, k, v = (t.unflatten(0, (-1, length)) for t in (q_TQH, k_TGH, v_TGV))
    is_plain = rule.sinks_Q is None and (rule.window is None or rule.window >= length)
    has_usual_shape = q.shape[-1] == v.shape[-1] and rule.scale == q.shape[-1] ** -0.5
    if is_plain and has_usual_shape:
        out_BLQH = attend_causally(q, k, v)
        if out_BLQH is not None:
            return out_BLQH.flatten(0, 1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return attend_heads(q, k, v, rule).transpose(1, 2).flatten(0, 1)


def _packed(
    q_TQH: Tensor, k_TGH: Tensor, v_TGV: Tensor, packing: Packing, rule: AttentionRule
) -> Tensor:
    sizes = [count * length for count, length in packing.groups]
    parts = (t.index_select(0, packing.rows_P).split(sizes) for t in (q_TQH, k_TGH, v_TGV))
    lengths = [length for _, length in packing.groups]
    out = [_uniform(q, k, v, n, rule) for q, k, v, n in zip(*parts, lengths, strict=True)]
    return torch.cat(out).index_select(0, packing.places_T)


def _one_sequence(
    q_LQH: Tensor,
    k_LGH: Tensor,
    v_LGV: Tensor,
    cache: KVCache | None,
    rule: AttentionRule,
    layer: int,
) -> Tensor:
    q, k, v = (t.transpose(0, 1) for t in (q_LQH, k_LGH, v_LGV))
    past = 0
    if cache is not None:
        past = cache.length
        cache.append(layer, k, v)
        k, v = cache.view(layer, past + k.shape[1])
    out_BQLV = attend_heads(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), rule, past)
    return out_BQLV.squeeze(0).transpose(0, 1)
