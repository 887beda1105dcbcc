"""Tables of the hash router: from token ids, or pairs of them, to experts.

K choices, V vocabulary, D width of an embedding, E experts.
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from .draws import MIX
from .kmeans_fit import CHUNK_ROWS, fit_centroids, nearest, squared_distances


def random_table(vocab_size: int, num_experts: int, k: int, seed: int) -> Tensor:
    """Draw k distinct experts for every token id: int32 ``[V, K]``."""
    generator = torch.Generator("cpu").manual_seed(seed)
    draws_VE = torch.rand(vocab_size, num_experts, generator=generator, device="cpu")
    return draws_VE.topk(k, dim=-1).indices.int()


def balanced_table(token_counts: Sequence[int], num_experts: int, k: int) -> Tensor:
    """Give each token id, most frequent first, to the k experts with the least traffic so far.

    Ids that never occur count as one occurrence, so that they are spread out too. Ties go to the
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


def clustered_table(embeddings_VD: Tensor, num_experts: int, k: int, seed: int) -> Tensor:
    """Give each token id to the k experts whose clusters of embeddings are nearest to its own.

    One cluster for each expert, so similar tokens share experts and loads are uneven. Returns int32
    ``[V, K]``, the nearest first.
    """
    embeddings_VD = embeddings_VD.detach().cpu().double()
    centroids_ED = fit_centroids(embeddings_VD, num_experts, seed)
    parts = [
        squared_distances(rows_nD, centroids_ED).topk(k, dim=1, largest=False).indices
        for rows_nD in embeddings_VD.split(CHUNK_ROWS)
    ]
    return torch.cat(parts).int()


def dispersed_table(
    embeddings_VD: Tensor, token_counts: Sequence[int], num_experts: int, k: int, seed: int
) -> Tensor:
    """Spread each cluster of similar tokens evenly over all experts: int32 ``[V, K]``.

    As many clusters as experts. Within a cluster, tokens take the experts in turn, frequent tokens
    first, and the next cluster goes on where the last one stopped.
    """
    embeddings_VD = embeddings_VD.detach().cpu()
    centroids_ED = fit_centroids(embeddings_VD, num_experts, seed)
    clusters = nearest(embeddings_VD, centroids_ED).tolist()
    order = sorted(
        range(len(clusters)), key=lambda token: (clusters[token], -token_counts[token], token)
    )
    table_VK = torch.empty(len(clusters), k, dtype=torch.int32, device="cpu")
    turns_VK = torch.arange(len(order) * k, device="cpu").view(-1, k) % num_experts
    table_VK[order] = turns_VK.int()
    return table_VK


def segmented_table(vocab_size: int, num_experts: int, k: int, seed: int) -> Tensor:
    """Draw one expert of each of k equal groups for every token id: int32 ``[V, K]``."""
    generator = torch.Generator("cpu").manual_seed(seed)
    size = num_experts // k
    table_VK = torch.randint(size, (vocab_size, k), generator=generator, device="cpu")
    return (table_VK + size * torch.arange(k, device="cpu")).int()


def rows_of_pairs(ids_T: Tensor, previous_ids_T: Tensor, num_rows: int) -> Tensor:
    """Return the table's row for each pair of a token and the one before, -1 for none.

    A multiplicative hash: the high bits of products in int64 depend on all bits of both ids.
    """
    mixed_T = ((ids_T + 1) * MIX + previous_ids_T + 2) * MIX
    return (mixed_T >> 24) % num_rows
