"""Auxiliary losses over the global batch.

L MoE layers, E experts, K choices, T tokens of the global batch.

Every rank returns its own share; the shares sum to the loss of one process holding all tokens,
value and gradient alike. Only counts, which carry no gradient, cross ranks: the balance loss is
linear in the probabilities once the global counts are known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .router import Router
from .router_config import TopK
from .routing import Reduce, Routing


@dataclass(slots=True)
class AuxiliaryLosses:
    """This rank's share of the auxiliary losses, and the global counts they were computed with."""

    total: Tensor
    """Sum over layers of coefficient times loss, with gradient."""
    balance: Tensor
    """Mean over layers of the balance loss without its coefficient; 1 is perfect balance."""
    z: Tensor
    """Mean over layers of the z-loss without its coefficient."""
    counts_LE: Tensor
    """int64: routed rows of the global batch, per layer and expert."""
    num_tokens: Tensor
    """int64: tokens of the global batch."""


def auxiliary_losses(
    routings: Sequence[Routing], routers: Sequence[Router], reduce: Reduce
) -> AuxiliaryLosses:
    """Compute the losses of all MoE layers with one reduction.

    Balance (Switch eq. 4-6, GShard; Megatron's normalisation): ``E / (K T^2) * sum_e n_e P_e``,
    n_e the routed rows and P_e the summed probability of expert e over the global batch.
    Sequence balance (DeepSeek-V3 eq. 17-20): the same over each sequence, averaged over sequences.
    z (ST-MoE eq. 5): ``1/T * sum_t logsumexp(logits_t)^2``.
    """
    counts_LE = torch.stack([routing.counts_E for routing in routings])
    num_tokens = routings[0].num_tokens
    num_sequences = routings[0].num_sequences
    sizes = [num_tokens, num_tokens if num_sequences is None else num_sequences]
    packed = reduce(torch.cat([counts_LE.flatten(), torch.stack(sizes)]))
    counts_LE, (num_tokens, num_sequences) = packed[:-2].view_as(counts_LE), packed[-2:]
    divisor = num_tokens.clamp(min=1)  # a batch without tokens has no loss

    zero = routings[0].weights_TK.new_zeros(())
    total, balance, z = zero, zero, zero
    for routing, router, counts_E in zip(routings, routers, counts_LE, strict=True):
        config = router.config
        if not isinstance(config, TopK):
            continue
        assert routing.probability_sums_E is not None and routing.z_sum is not None
        scale = router.num_experts / (router.k * divisor.double() ** 2)
        layer_balance = (counts_E * scale * routing.probability_sums_E).sum().to(zero.dtype)
        layer_z = routing.z_sum / divisor
        total = total + config.balance_loss * layer_balance + config.z_loss * layer_z
        if routing.sequence_balance_sum is not None:
            per_sequence = routing.sequence_balance_sum / num_sequences.clamp(min=1)
            total = total + config.sequence_balance_loss * per_sequence
        balance = balance + layer_balance.detach() / len(routings)
        z = z + layer_z.detach() / len(routings)
    return AuxiliaryLosses(total, balance, z, counts_LE, num_tokens)
