"""What a ring over parts of a window would compute: is it exact, and what does merging cost?

    python benchmarks/ring_attention.py

One process plays all ranks in turn, so nothing travels. Each part of the queries meets each part of
keys and values before it. Parts are merged by log-sum-exp, forward and backward. The other side is
F.scaled_dot_product_attention on the whole window. A figure is the median of ratios of times that
were taken in turns.

Q query heads, L tokens of a window, H head width, P parts.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
HEADS, WIDTH = 8, 64
LENGTHS, PARTS, ROUNDS = (1024, 4096), (2, 4), 3


class Ring(torch.autograd.Function):
    """Causal attention of ``[1, Q, L, H]``, in ``parts`` of the window."""

    @staticmethod
    def forward(ctx, q, k, v, parts):  # type: ignore[no-untyped-def]
        outputs, sums = [], []
        for i, q_i in enumerate(q.chunk(parts, 2)):
            blocks = zip(k.chunk(parts, 2)[: i + 1], v.chunk(parts, 2), strict=False)
            out, lse = None, None
            for j, (k_j, v_j) in enumerate(blocks):
                new, new_lse = attend(q_i, k_j, v_j, 0.0, j == i)
                out, lse = (new, new_lse) if out is None else merged(out, lse, new, new_lse)
            outputs.append(out)
            sums.append(lse)
        ctx.parts = parts
        ctx.save_for_backward(q, k, v, *outputs, *sums)
        return torch.cat(outputs, 2)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        parts = ctx.parts
        q, k, v, *kept = ctx.saved_tensors
        outputs, sums = kept[:parts], kept[parts:]
        grads = [torch.zeros_like(t) for t in (q, k, v)]
        cut = [t.chunk(parts, 2) for t in (q, k, v, grad)]
        into = [t.chunk(parts, 2) for t in grads]
        for i in range(parts):
            for j in range(i + 1):
                rows = (cut[3][i], cut[0][i], cut[1][j], cut[2][j], outputs[i], sums[i])
                found = attend_backward(*rows, 0.0, j == i)
                for place, index, part in zip(into, (i, j, j), found, strict=True):
                    place[index].add_(part)
        return *grads, None


def merged(out: Tensor, lse: Tensor, new: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two softmaxes over different keys."""
    both = torch.logaddexp(lse, new_lse)
    old_share, new_share = ((part - both).exp().unsqueeze(-1) for part in (lse, new_lse))
    return out * old_share.to(out.dtype) + new * new_share.to(out.dtype), both


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    shape = (1, HEADS, length, WIDTH)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]


def results(attention, tensors: list[Tensor]) -> list[Tensor]:
    out = attention(*tensors)
    gradients = torch.autograd.grad(out.square().sum(), tensors)
    return [out.detach(), *gradients]


def seconds(attention, tensors: list[Tensor]) -> float:
    began = time.perf_counter()
    results(attention, tensors)
    return time.perf_counter() - began


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for parts in PARTS:
        tensors = inputs(1024, torch.float64)
        found = results(lambda q, k, v, p=parts: Ring.apply(q, k, v, p), tensors)
        pairs = zip(found, results(whole, tensors), strict=True)
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        print(f"fp64, 1024 tokens, {parts} parts: output and gradients differ by {worst:.1e}")
    for length in LENGTHS:
        tensors = inputs(length, torch.float32)
        for parts in PARTS:
            ratios = []
            for _ in range(ROUNDS):
                ring_s = seconds(lambda q, k, v, p=parts: Ring.apply(q, k, v, p), tensors)
                ratios.append(ring_s / seconds(whole, tensors))
            print(
                f"fp32, {length:5} tokens, {parts} parts: all parts together take "
                f"{statistics.median(ratios):.2f} times as long as the whole "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
