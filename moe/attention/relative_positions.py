"""Relative positions in attention: a learned number for each head and each bucket of distances.

L queries, S keys, Q heads, N buckets. The scheme is T5's (Raffel et al. 2020, section 2.1).
"""

import math

import torch
from torch import Tensor


def distance_buckets(
    queries_L: Tensor,
    keys_S: Tensor,
    num_buckets: int,
    max_distance: int,
    *,
    both_directions: bool,
) -> Tensor:
    """Return int64 ``[L, S]``: the bucket of each query's distance to each key.

    Positions are int64. The first half of the buckets are small distances, one each; the others
    share the distances up to ``max_distance``, each wider than the one before. With
    ``both_directions`` half of all buckets are for keys behind the query; without, those count as
    distance 0, because a causal mask hides them.
    """
    ahead_LS = keys_S[None, :] - queries_L[:, None]
    first_LS = torch.zeros_like(ahead_LS)
    if both_directions:
        num_buckets //= 2
        first_LS = (ahead_LS > 0).long() * num_buckets
        distance_LS = ahead_LS.abs()
    else:
        distance_LS = (-ahead_LS).clamp(min=0)
    num_exact = num_buckets // 2
    # fp32, and in this order: a bucket's border must fall where the released weights had it.
    share_LS = torch.log(distance_LS.float() / num_exact) / math.log(max_distance / num_exact)
    wide_LS = num_exact + (share_LS * (num_buckets - num_exact)).long()
    wide_LS = wide_LS.clamp(max=num_buckets - 1)
    return first_LS + torch.where(distance_LS < num_exact, distance_LS, wide_LS)
