"""Auxiliary losses over the global batch.

L MoE layers, E experts, K choices, T tokens of the global batch.

Every rank returns its own share; the shares sum to the loss of one process holding all tokens,
value and gradient alike. Only counts, which carry no gradient, cross ranks: the balance loss is
linear in the probabilities once the global counts are known.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError
from .config import TopK
from .router import Router
from .routing import Reduce, Routing


@dataclass(slots=True)
class AuxiliaryLosses:
    """This rank's share of the auxiliary losses, and the global counts they were computed with."""

    total: Tensor
    """Sum over layers of coefficient times loss, with gradient."""
    balance: Tensor
    """Mean over layers of the balance loss without its coefficient, however it is pooled; 1 is
    perfect balance."""
    z: Tensor
    """Mean over layers of the z-loss without its coefficient."""
    counts_LE: Tensor
    """int64: routed rows of the global batch, per layer and expert."""
    num_tokens: Tensor
    """int64: tokens of the global batch."""


class _Layer(NamedTuple):
    """A layer's part of this rank, with counts of the global batch."""

    router: Router
    config: TopK
    routing: Routing
    counts_E: Tensor
    num_tokens: Tensor
    num_sequences: Tensor


def auxiliary_losses(
    routings: Sequence[Routing], routers: Sequence[Router], reduce: Reduce
) -> AuxiliaryLosses:
    """Compute the losses of all MoE layers, which have as many experts each, with one reduction.

    Balance (Switch eq. 4-6, GShard; Megatron's normalisation): ``E / (K T^2) * sum_e n_e P_e``,
    n_e the routed rows and P_e the summed probability of expert e over the global batch; with
    ``balance_over: model`` n_e, P_e and T are first summed over the layers (transformers'
    ``load_balancing_loss_func``, which leaves out the K).
    Sequence balance (DeepSeek-V3 eq. 17-20): the same over each sequence, averaged over sequences.
    z (ST-MoE eq. 5): ``1/T * sum_t logsumexp(logits_t)^2``.
    """
    counts = _global_counts(routings, reduce)
    layers = list(_learned(routings, routers, counts))
    zero = routings[0].weights_TK.new_zeros(())
    balance, z = zero, zero
    by_layer = [(_balance([layer]), _z(layer)) for layer in layers]
    for layer_balance, layer_z in by_layer:
        balance = balance + layer_balance.detach() / len(routings)
        z = z + layer_z.detach() / len(routings)
    counts_LE = torch.stack([counts_E for counts_E, _, _ in counts])
    return AuxiliaryLosses(_total(layers, by_layer, zero), balance, z, counts_LE, counts[0][1])


def total_loss(
    routers: Sequence[Router], routings: Sequence[Routing], reduce: Reduce | None = None
) -> Tensor:
    """Return what :func:`auxiliary_losses` calls the total, for routers of any sizes.

    Raises :class:`ConfigError` for routings whose gradient would be lost.
    """
    if not routings or len(routings) != len(routers):
        raise ConfigError(
            f"there are {len(routers)} MoE layers and {len(routings)} routings; give each layer's "
            "routing, in the same order."
        )
    for router, routing in zip(routers, routings, strict=True):
        _check_gradient(router, routing)
    counts = _global_counts(routings, reduce or (lambda counts: counts))
    zero = routings[0].weights_TK.new_zeros(())
    layers = list(_learned(routings, routers, counts))
    return _total(layers, [(_balance([layer]), _z(layer)) for layer in layers], zero)


def _check_gradient(router: Router, routing: Routing) -> None:
    if not isinstance(router.config, TopK):
        return
    sums_E = routing.probability_sums_E
    if sums_E is None:
        raise ConfigError(
            "the routing has no sums for losses, which routers keep in training mode only; call "
            "train() on the layer before its forward."
        )
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in router.parameters())
    if learns and not sums_E.requires_grad:
        raise ConfigError(
            "the routing has no gradient; take the layer's forward out of torch.no_grad(), and "
            "checkpoint it with use_reentrant=False."
        )


def _global_counts(
    routings: Sequence[Routing], reduce: Reduce
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return each layer's counts, tokens and sequences over the global batch."""
    parts = [
        torch.cat(
            [
                routing.counts_E,
                routing.num_tokens.view(1),
                (
                    routing.num_tokens if routing.num_sequences is None else routing.num_sequences
                ).view(1),
            ]
        )
        for routing in routings
    ]
    summed = reduce(torch.cat(parts)).split([len(part) for part in parts])
    return [(part[:-2], part[-2], part[-1]) for part in summed]


def _learned(
    routings: Sequence[Routing],
    routers: Sequence[Router],
    counts: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> Iterator[_Layer]:
    """Yield the layers whose router learns, which others have no losses."""
    for routing, router, seen in zip(routings, routers, counts, strict=True):
        if isinstance(router.config, TopK):
            yield _Layer(router, router.config, routing, *seen)


def _total(
    layers: Sequence[_Layer], by_layer: Sequence[tuple[Tensor, Tensor]], zero: Tensor
) -> Tensor:
    """Return the sum of all losses; ``by_layer`` has each layer's balance and z."""
    total = zero
    pools: dict[tuple[int, int, float], list[_Layer]] = {}
    for layer, (layer_balance, layer_z) in zip(layers, by_layer, strict=True):
        config = layer.config
        if config.balance_over == "layer":
            total = total + config.balance_loss * layer_balance
        else:
            key = (layer.router.num_experts, layer.router.k, config.balance_loss)
            pools.setdefault(key, []).append(layer)
        total = total + config.z_loss * layer_z
        if layer.routing.sequence_balance_sum is not None:
            num_sequences = layer.num_sequences.clamp(min=1)
            per_sequence = layer.routing.sequence_balance_sum / num_sequences
            total = total + config.sequence_balance_loss * per_sequence
    for (_, _, coefficient), members in pools.items():
        total = total + coefficient * _balance(members)
    return total


def _balance(pool: Sequence[_Layer]) -> Tensor:
    """Return the balance loss of layers that have as many experts and choices each."""
    router = pool[0].router
    counts_E, sums_E, num_tokens = pool[0].counts_E, _sums(pool[0]), pool[0].num_tokens
    for layer in pool[1:]:
        counts_E, sums_E = counts_E + layer.counts_E, sums_E + _sums(layer)
        num_tokens = num_tokens + layer.num_tokens
    divisor = num_tokens.clamp(min=1).double()  # a batch without tokens has no loss
    scale = router.num_experts / (router.k * divisor**2)
    return (counts_E * scale * sums_E).sum().to(pool[0].routing.weights_TK.dtype)


def _z(layer: _Layer) -> Tensor:
    assert layer.routing.z_sum is not None
    return layer.routing.z_sum / layer.num_tokens.clamp(min=1)


def _sums(layer: _Layer) -> Tensor:
    assert layer.routing.probability_sums_E is not None
    return layer.routing.probability_sums_E
