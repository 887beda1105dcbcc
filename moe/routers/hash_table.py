"""Tables for hash routing (Roller et al. 2021, "Hash Layers for Large Sparse Models").

V vocabulary, K choices.
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor


def random_table(vocab_size: int, num_experts: int, k: int, seed: int) -> Tensor:
    """Draw k distinct experts for every token id: int32 ``[V, K]``."""
    generator = torch.Generator("cpu").manual_seed(seed)
    draws_VE = torch.rand(vocab_size, num_experts, generator=generator, device="cpu")
    return draws_VE.topk(k, dim=-1).indices.int()


def balanced_table(token_counts: Sequence[int], num_experts: int, k: int) -> Tensor:
    """Give each token id, most frequent first, to the k experts with the least traffic so far.

    Ids that never occur count as one occurrence, so that they too are spread out. Ties go to the
    lower id. Returns int32 ``[V, K]``.
    """
    table_VK = torch.empty(len(token_counts), k, dtype=torch.int32, device="cpu")
    heap = [(0, expert) for expert in range(num_experts)]
    by_frequency = sorted(range(len(token_counts)), key=lambda token: (-token_counts[token], token))
    for token in by_frequency:
        lightest = [heapq.heappop(heap) for _ in range(k)]
        table_VK[token] = torch.tensor([expert for _, expert in lightest], device="cpu")
        for load, expert in lightest:
            heapq.heappush(heap, (load + max(1, token_counts[token]), expert))
    return table_VK
