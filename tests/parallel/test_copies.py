"""Copies of experts: one buffer for layers and steps that hold different numbers of experts."""

import pytest
import torch

from moeyard.moe.experts.resident import Experts
from moeyard.parallel.experts.copies import Copies


def run(copies, held):
    """Return a forward of rows that choose the held experts, and the weights that it used."""
    copies.hold(held)
    weights = {}
    for expert in held:
        parts = copies.weights_of(expert)
        for part in parts:
            part.copy_(torch.randn_like(part))
        weights[expert] = [part.clone() for part in parts]
    x_ND = torch.randn(6, 4, dtype=torch.float64)
    experts_NK = torch.tensor(held)[torch.arange(6) % len(held)].unsqueeze(1)
    y_ND = copies.experts(x_ND, experts_NK, torch.ones(6, 1, dtype=torch.float64))
    return y_ND, weights, x_ND, experts_NK


def gradients(copies, held, forward):
    """Return the gradients of the copies, whose weights have arrived again."""
    y_ND, weights, _, _ = forward
    copies.hold(held)
    for expert in held:
        for part, value in zip(copies.weights_of(expert), weights[expert], strict=True):
            part.copy_(value)
    y_ND.sum().backward()
    copies.collect_gradients()
    return {expert: [part.clone() for part in copies.gradients_of(expert)] for expert in held}


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_layers_of_a_buffer_may_hold_different_numbers_of_experts(backend):
    torch.manual_seed(1)
    own = Experts(4, 8, 5, range(1), backend, "swiglu", False, False).double()
    copies = Copies(own, 3)
    layers = [(1, 2), (3,), (1, 3, 4)]
    forwards = [run(copies, held) for held in layers]  # backward comes in the other order
    found = [gradients(copies, h, f) for h, f in zip(layers[::-1], forwards[::-1], strict=True)]
    for held, forward, actual in zip(layers, forwards, found[::-1], strict=True):
        _, weights, x_ND, experts_NK = forward
        for expert in held:
            fresh = own.like(1)
            fresh.hold([expert])
            for parameter, value in zip((fresh.fc1, fresh.fc2), weights[expert], strict=True):
                parameter.data[0] = value
            rows = experts_NK[:, 0] == expert
            one = torch.ones(int(rows.sum()), 1, dtype=torch.float64)
            fresh(x_ND[rows], experts_NK[rows], one).sum().backward()
            for parameter, gradient in zip((fresh.fc1, fresh.fc2), actual[expert], strict=True):
                torch.testing.assert_close(gradient, parameter.grad[0], rtol=1e-12, atol=1e-12)
