"""Two ranks of one batch: helpers for tests of routers. T tokens, E experts."""

import dataclasses

import torch

import moeyard
from moeyard.moe.routers.losses import global_counts
from moeyard.moe.routers.routing import RouterInput

Routings = list[moeyard.Routing]


def part_of(given: RouterInput, first: int, last: int) -> RouterInput:
    """Return sequences ``first`` to ``last`` of ``given``, which has lengths."""
    rows = slice(sum(given.lengths[:first]), sum(given.lengths[:last]))
    changes = {"lengths": given.lengths[first:last]}
    if given.draw_keys is not None:
        changes["draw_keys"] = given.draw_keys[first:last]
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        if isinstance(value, torch.Tensor):
            changes[field.name] = value[rows]
    return dataclasses.replace(given, **changes)


def loss_and_gradients(gate: moeyard.Router, parts: list[RouterInput]):
    """Route ``parts`` as ranks do; return the summed shares of the loss, gradients and counts."""
    gate.zero_grad()
    total, whole = _on_ranks(gate, parts)
    total.backward()
    gradients = {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in gate.named_parameters()
    }
    return total.detach(), gradients, whole


def losses_of_ranks(gate: moeyard.Router, parts: list[RouterInput]) -> torch.Tensor:
    """Route ``parts`` as ranks do; return the summed shares of the loss with their graph."""
    return _on_ranks(gate, parts)[0]


def _on_ranks(
    gate: moeyard.Router, parts: list[RouterInput]
) -> tuple[torch.Tensor, moeyard.GlobalCounts]:
    """Return the summed shares, and the counts of all parts."""
    routings = [gate.route(part) for part in parts]
    counts = [global_counts([routing], lambda own: own)[0] for routing in routings]
    whole = counts[0]
    for more in counts[1:]:
        whole = whole.plus(more)
    shares = [sum(gate.losses(routing, whole).terms) for routing in routings]
    return torch.stack(shares).sum(), whole


def assert_shares_add_up(gate: moeyard.Router, given: RouterInput, tolerance: float = 1e-12):
    """Check that the first sequence on one rank and the others on another give the same loss."""
    value, gradients, counts = loss_and_gradients(gate, [given])
    parts = [part_of(given, 0, 1), part_of(given, 1, len(given.lengths))]
    sum_of_shares, summed, sums = loss_and_gradients(gate, parts)
    torch.testing.assert_close(sum_of_shares, value, rtol=tolerance, atol=tolerance)
    for name, gradient in gradients.items():
        assert (gradient is None) == (summed[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(summed[name], gradient, rtol=tolerance, atol=tolerance)
    assert torch.equal(sums.counts_E, counts.counts_E)
    assert sums.extra.keys() == counts.extra.keys()
    return value, gradients


def dense(routing: moeyard.Routing, num_experts: int) -> torch.Tensor:
    """Return the weight of each expert, ``[T, E]``."""
    present = routing.experts_TK >= 0
    weights = torch.where(present, routing.weights_TK, 0)
    empty = weights.new_zeros(len(weights), num_experts)
    return empty.scatter_add(1, routing.experts_TK.clamp(min=0).long(), weights)


def step(t: float, width: float) -> float:
    """The smooth-step function of one number."""
    if t <= -width / 2:
        return 0.0
    if t >= width / 2:
        return 1.0
    return -2 * t**3 / width**3 + 3 * t / (2 * width) + 0.5
