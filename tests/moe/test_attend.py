"""What attention asks of torch's kernels on a GPU; without a GPU."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from moeyard.moe.attention import attend
from moeyard.moe.attention.attend import AttentionRule, attend_heads

Q, G, H = 4, 2, 8


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


CASES = {
    "window": (12, AttentionRule(H**-0.5, window=5), 0, torch.bfloat16, Q),
    "sinks": (12, AttentionRule(H**-0.5, sinks_Q=torch.randn(Q)), 0, torch.bfloat16, Q),
    "later_chunk": (5, AttentionRule(H**-0.5), 7, torch.bfloat16, Q),
    "fp32": (12, AttentionRule(H**-0.5), 0, torch.float32, Q),
    "plain": (12, AttentionRule(H**-0.5), 0, torch.bfloat16, G),
    "decoding": (1, AttentionRule(H**-0.5), 11, torch.bfloat16, G),
}
"""Rows, rule, rows before, type, and the heads of keys that torch gets."""


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_gets_as_many_key_heads_as_its_fast_kernels_need(case, monkeypatch):
    """Grouped heads with a mask, or in fp32, would run in the fallback that writes all scores."""
    length, rule, past, dtype, heads = CASES[case]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, Q, length, H, generator=generator).to(dtype)
    k, v = (torch.randn(1, G, past + length, H, generator=generator).to(dtype) for _ in "kv")
    expected = attend_heads(q, k, v, rule, past)
    seen = []

    def record(query, key, value, *arguments, **options):
        seen.append((key.shape[1], value.shape[1], options["enable_gqa"]))
        return F.scaled_dot_product_attention(query, key, value, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(attend, "F", SimpleNamespace(scaled_dot_product_attention=record, pad=F.pad))
        found = attend_heads(*(t.as_subclass(OnGpu) for t in (q, k, v)), rule, past)
    assert seen == [(heads, heads, heads < Q)]
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
