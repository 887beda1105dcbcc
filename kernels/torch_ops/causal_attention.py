"""Causal attention with its backward, as matrix products over blocks of queries, for CPUs.

B sequences of length L, G key/value heads, r query heads each (Q = G*r), H head width, s queries of
a block, b keys up to the block's end.

A block of queries is multiplied only with the keys up to its own end, so the upper triangle is not
computed. The query heads of one key/value head are rows of one product. The probabilities are kept
for backward.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 64
"""Queries of a block. Forward and backward of 8 query heads of 64 over 4, length 1024, one core of
an AMD EPYC: fp32 50 ms with 64, 53 with 128, F.sdpa 70; bf16 36, 35 and 59
(benchmarks/cpu_kernels.py)."""
LENGTHS = range(64, 2049)
"""Lengths at which it pays. Shorter sequences are little work. For longer ones the L * L * Q / 2
kept probabilities become the largest part of a layer's activations; F.sdpa keeps none."""


class CausalAttention(torch.autograd.Function):
    """``softmax(q k^T / sqrt(H) below the diagonal) v`` of ``[B, L, heads, H]`` tensors.

    In bf16 scores and softmax are computed in fp32, probabilities and products in bf16.
    """

    @staticmethod
    def forward(ctx, q_BLQH, k_BLGH, v_BLGH):  # type: ignore[no-untyped-def]
        num_groups = k_BLGH.shape[2]
        q, k, v = (_heads_first(t, num_groups) for t in (q_BLQH, k_BLGH, v_BLGH))
        out_BLQH = torch.empty_like(q_BLQH, memory_format=torch.contiguous_format)
        wide = torch.promote_types(q.dtype, torch.float32)
        q_wide, k_wide = q.to(wide) * _scale(q), k.to(wide)
        kept = []
        for start, end in _blocks(q.shape[2]):
            scores = torch.bmm(_rows(q_wide, start, end), k_wide[:, 0, :end].mT)
            scores = scores.view(*q.shape[:2], end - start, end)
            scores[..., start:].masked_fill_(_above_diagonal(end - start, q.device), -torch.inf)
            p = scores.softmax(dim=-1).to(q.dtype).flatten(1, 2)
            _put(out_BLQH, torch.bmm(p, v[:, 0, :end]), start, end)
            kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        return out_BLQH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLQH):  # type: ignore[no-untyped-def]
        q, k, v, *kept = ctx.saved_tensors
        num_sequences, length, _, width = grad_BLQH.shape
        num_groups = k.shape[0] // num_sequences
        grad = _heads_first(grad_BLQH, num_groups)
        grad_q_BLQH = torch.empty_like(grad_BLQH, memory_format=torch.contiguous_format)
        wide = torch.promote_types(q.dtype, torch.float32)
        grad_k, grad_v = k.new_zeros(2, k.shape[0], length, width, dtype=wide)
        for (start, end), p in zip(_blocks(length), kept, strict=True):
            rows, queries = _rows(grad, start, end), _rows(q, start, end)
            grad_p = torch.bmm(rows, v[:, 0, :end].mT)
            grad_s = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            _put(grad_q_BLQH, torch.bmm(grad_s, k[:, 0, :end]).mul_(_scale(q)), start, end)
            _add_product(grad_k[:, :end], grad_s.mT, queries)
            _add_product(grad_v[:, :end], p.mT, rows)
        grad_k *= _scale(q)
        shape = (num_sequences, num_groups, length, width)
        grads = (g.view(shape).transpose(1, 2).to(q.dtype) for g in (grad_k, grad_v))
        return grad_q_BLQH, *grads


def can_run(q_BLQH: Tensor) -> bool:
    """Say whether this trains faster than F.sdpa: on a CPU, for sequences of medium length."""
    return torch.is_grad_enabled() and not q_BLQH.is_cuda and q_BLQH.shape[1] in LENGTHS


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _scale(q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5)


def _heads_first(x_BLQH: Tensor, num_groups: int) -> Tensor:
    """Return a contiguous ``[B*G, heads of the group, L, H]``."""
    x_BGrLH = x_BLQH.unflatten(2, (num_groups, -1)).permute(0, 2, 3, 1, 4)
    return x_BGrLH.contiguous().flatten(0, 1)


def _rows(x: Tensor, start: int, end: int) -> Tensor:
    """Return a block's rows of all heads of a group, ``[B*G, r*s, H]``."""
    return x[:, :, start:end].flatten(1, 2)


def _put(out_BLQH: Tensor, block: Tensor, start: int, end: int) -> None:
    """Write a block's ``[B*G, r*s, H]`` to its rows of ``out_BLQH``."""
    num_sequences, _, num_heads, width = out_BLQH.shape
    block = block.view(num_sequences, num_heads, end - start, width)
    out_BLQH[:, start:end].copy_(block.transpose(1, 2))


def _above_diagonal(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to a sum that may be wider."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)
