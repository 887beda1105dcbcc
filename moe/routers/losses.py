"""Auxiliary losses over the global batch.

L MoE layers, E experts, K choices, T tokens of the global batch.

Every rank returns its own share. The shares sum to the loss of one process with all tokens, in
value and in gradient. Ranks exchange only counts, which have no gradient: once the global counts
are known, the balance loss is linear in the probabilities.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ConfigError
from ...kernels.values.memory import to_device
from .loss_terms import BalanceSums, GlobalCounts, LayerLosses
from .router import Router
from .routing import Reduce, Routing


@dataclass(slots=True)
class AuxiliaryLosses:
    """This rank's share of the auxiliary losses, and the global counts they were computed with."""

    total: Tensor
    """Sum over layers of coefficient times loss, with gradient."""
    balance: Tensor
    """Mean over layers of the balance loss without its coefficient, pooled or not; 1 is perfect
    balance."""
    z: Tensor
    """Mean over layers of the z-loss without its coefficient."""
    counts: list[GlobalCounts]
    """The counts of the global batch, per layer."""

    @property
    def counts_LE(self) -> Tensor:
        """int64: routed rows of the global batch, per layer and expert."""
        return stacked(self.counts)

    @property
    def num_tokens(self) -> Tensor:
        """int64: tokens of the global batch."""
        return self.counts[0].num_tokens


def stacked(counts: Sequence[GlobalCounts]) -> Tensor:
    """Return int64 ``[L, E]``: routed rows per layer and expert; ``[0]`` without layers."""
    if not counts:
        return torch.zeros(0, dtype=torch.int64)
    return torch.stack([layer.counts_E for layer in counts])


def auxiliary_losses(
    routings: Sequence[Routing],
    routers: Sequence[Router],
    reduce: Reduce,
    num_layers: int | None = None,
) -> AuxiliaryLosses:
    """Compute the losses of all MoE layers, with equal numbers of experts, in one reduction.

    ``num_layers`` are the MoE layers over which means are taken, if these are a part of them: a
    stage's. Means of all stages add up to that of the model; pooled losses do not.

    Each router says what it adds (:meth:`Router.losses`). Pooled balance losses first
    sum n_e, P_e and T over their layers (like transformers' ``load_balancing_loss_func``, which
    leaves out the K).
    """
    counts = global_counts(routings, reduce)
    by_layer = _losses(routings, routers, counts)
    divisor = num_layers or len(routings)
    zero = routings[0].weights_TK.new_zeros(())
    balance, z = zero, zero
    for layer in by_layer:
        if layer.balance is not None:
            balance = balance + layer.balance.detach() / divisor
        if layer.z is not None:
            z = z + layer.z.detach() / divisor
    return AuxiliaryLosses(_total(by_layer, zero), balance, z, counts)


def total_loss(
    routers: Sequence[Router], routings: Sequence[Routing], reduce: Reduce | None = None
) -> Tensor:
    """Return the total of :func:`auxiliary_losses`, for routers of any sizes.

    Raises :class:`ConfigError` for routings whose gradient would be lost.
    """
    if not routings or len(routings) != len(routers):
        raise ConfigError(
            f"there are {len(routers)} MoE layers and {len(routings)} routings; give each layer's "
            "routing, in the same order."
        )
    counts = global_counts(routings, reduce or (lambda counts: counts))
    by_layer = _losses(routings, routers, counts)
    for router, layer in zip(routers, by_layer, strict=True):
        _check_gradient(router, layer)
    return _total(by_layer, routings[0].weights_TK.new_zeros(()))


def _losses(
    routings: Sequence[Routing], routers: Sequence[Router], counts: Sequence[GlobalCounts]
) -> list[LayerLosses]:
    return [
        router.losses(routing, layer_counts)
        for router, routing, layer_counts in zip(routers, routings, counts, strict=True)
    ]


def _check_gradient(router: Router, layer: LayerLosses) -> None:
    tensors = list(layer.terms)
    if layer.pooled is not None:
        tensors.append(layer.pooled[1].probability_sums_E)
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in router.parameters())
    if learns and tensors and not any(tensor.requires_grad for tensor in tensors):
        raise ConfigError(
            "the routing has no gradient; take the layer's forward out of torch.no_grad(), and "
            "checkpoint it with use_reentrant=False."
        )


def add_counts(before: list[GlobalCounts], more: list[GlobalCounts]) -> list[GlobalCounts]:
    """Return the sums of two micro-batches, layer by layer; ``before`` may be empty."""
    if not before:
        return more
    return [one.plus(other) for one, other in zip(before, more, strict=True)]


def global_counts(routings: Sequence[Routing], reduce: Reduce) -> list[GlobalCounts]:
    """Return each layer's counts over the global batch: one reduction for all of them."""
    here = [GlobalCounts(r.counts_E, r.num_tokens, r.extra_counts) for r in routings]
    parts = [part for counts in here for part in counts.parts()]
    device = routings[0].counts_E.device
    on_host = [part.reshape(-1) for part in parts if part.device != device]
    if on_host:  # a router may have counted tokens there: one copy for all of them
        moved = iter(to_device(torch.cat(on_host), device).split([len(part) for part in on_host]))
        parts = [p if p.device == device else next(moved).view(p.shape) for p in parts]
    return _together(here, parts, reduce)


def on_host(counts: Sequence[GlobalCounts]) -> list[GlobalCounts]:
    """Return counts on the host, in one copy from a GPU."""
    if all(part.is_cpu for layer in counts for part in layer.parts()):
        return list(counts)
    parts = [part for layer in counts for part in layer.parts()]
    return _together(counts, parts, lambda flat: flat.cpu())


def _together(
    counts: Sequence[GlobalCounts], parts: Sequence[Tensor], call: Callable[[Tensor], Tensor]
) -> list[GlobalCounts]:
    """Return ``counts`` with the values that ``call`` makes of all ``parts`` in one tensor."""
    flat = call(torch.cat([part.reshape(-1) for part in parts]))
    pieces = flat.split([part.numel() for part in parts])
    whole = iter([piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)])
    return [layer.like(whole) for layer in counts]


def _total(by_layer: Sequence[LayerLosses], zero: Tensor) -> Tensor:
    """Return the sum of all losses times their coefficients."""
    total = zero
    pools: dict[tuple[int, int, float], BalanceSums] = {}
    for layer in by_layer:
        for term in layer.terms:
            total = total + term
        if layer.pooled is not None:
            coefficient, sums = layer.pooled
            key = (sums.num_experts, sums.k, coefficient)
            pools[key] = pools[key].plus(sums) if key in pools else sums
    for (_, _, coefficient), sums in pools.items():
        total = total + coefficient * sums.loss()
    return total
