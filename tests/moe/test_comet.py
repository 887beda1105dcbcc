"""COMET against its formula, and what its limits promise. T tokens, D width, E experts, K trees."""

import math

import pytest
import torch

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.smooth_step import smooth_step

from router_shares import assert_shares_add_up, dense, step

D = 6


def build(num_experts=5, seed=0, spread=0.6, **fields):
    torch.manual_seed(seed)
    gate = moeyard.router("comet", **fields).build(RouterSizes(D, num_experts)).double()
    for parameter in gate.parameters():
        parameter.data.normal_(std=spread)
    return gate


def rows(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(sum(lengths), D, generator=generator, dtype=torch.float64)
    return RouterInput(x_TD=x_TD, lengths=lengths)


@torch.no_grad()
def by_hand(gate, x, num_experts):
    """One token's weights and entropy, node by node from the root."""
    num_nodes, unscaled, entropy = num_experts - 1, [0.0] * num_experts, 0.0
    for tree in range(gate.k):
        reach = {0: 1.0}
        for node in range(num_nodes):
            row = tree * num_nodes + node
            left = step(float(gate.node_weight[row] @ x + gate.node_bias[row]), gate.config.gamma)
            reach[2 * node + 1], reach[2 * node + 2] = reach[node] * left, reach[node] * (1 - left)
        for leaf in range(num_experts):
            p, row = reach[num_nodes + leaf], tree * num_experts + leaf
            unscaled[leaf] += p * math.exp(float(gate.leaf_weight[row] @ x + gate.leaf_bias[row]))
            entropy -= p * math.log(p + 1e-6)
    return [value / sum(unscaled) for value in unscaled], entropy


@pytest.mark.parametrize("num_experts", [1, 2, 5, 8, 11])
def test_weights_and_entropy_are_those_of_the_formula(num_experts):
    gate, given = build(num_experts, k=3 if num_experts > 2 else 1, gamma=2.0), rows(4, 3)
    routing = gate.route(given)
    expected = [by_hand(gate, x, num_experts) for x in given.x_TD]
    weights = torch.tensor([weights for weights, _ in expected], dtype=torch.float64)
    torch.testing.assert_close(dense(routing, num_experts), weights)
    assert torch.equal(routing.counts_E, (weights > 0).sum(0))
    entropy = sum(value for _, value in expected)
    torch.testing.assert_close(float(routing.extras["entropy_sum"].detach()), entropy)


def test_a_step_is_exactly_zero_and_one_outside_its_band():
    t = torch.tensor([-9.0, -0.15, 0.0, 0.15, 9.0])
    assert smooth_step(t, 0.3).tolist() == [0, 0, 0.5, 1, 1]
    inside = torch.linspace(-0.1499, 0.1499, 1001)
    values = smooth_step(inside, 0.3)
    assert (values > 0).all() and (values[:-5] < 1).all() and (values.diff() >= 0).all()


def test_decided_trees_send_a_token_to_at_most_k_experts_and_learn_no_nodes():
    gate, given = build(8, k=2, gamma=1e-4), rows(50)
    routing = gate.route(given)
    counts = (routing.experts_TK >= 0).sum(1)
    assert int(counts.max()) <= 2 and int(counts.min()) >= 1
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(50).double())
    (dense(routing, 8) * torch.randn(8)).sum().backward()
    assert not gate.node_weight.grad.any() and gate.leaf_weight.grad.any()


def test_a_new_router_visits_all_experts_about_equally():
    torch.manual_seed(0)
    gate = moeyard.router("comet", k=2).build(RouterSizes(D, 8)).requires_grad_(False)
    routing = gate.route(rows(20))
    assert routing.experts_TK.shape == (20, 8)
    assert float((routing.weights_TK - 1 / 8).abs().max()) < 0.06


class Weights(torch.nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, given, mixer_TE):
        routing = self.gate.route(given)
        weights_TE = dense(routing, self.gate.num_experts)
        return (weights_TE * mixer_TE).sum() + routing.extras["entropy_sum"]


def test_gradients_are_those_of_finite_differences():
    gate = Weights(build(5, k=2, gamma=6.0))
    given, names = (rows(3), torch.randn(3, 5).double()), [n for n, _ in gate.named_parameters()]

    def value(*parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(gate, named, given)

    assert torch.autograd.gradcheck(value, [p.detach().requires_grad_() for p in gate.parameters()])


def test_shares_of_two_ranks_add_up():
    given = rows(4, 2, 5)
    value, gradients = assert_shares_add_up(build(5, gamma=3.0), given)
    assert value > 0 and gradients["node_weight"].any() and gradients["leaf_weight"] is None
    more, gradients = assert_shares_add_up(
        build(5, gamma=3.0, importance_loss=0.1), given, tolerance=1e-9
    )
    sums_E = dense(build(5, gamma=3.0).route(given), 5).detach().sum(0)
    variation = float(sums_E.var() / sums_E.mean() ** 2)
    assert float(more - value) == pytest.approx(0.1 * variation) and gradients["leaf_weight"].any()


def test_losses_need_a_routing_of_training():
    gate = build()
    layer = moeyard.MoELayer(D, 4, 5, router=gate.config)
    routing = layer.eval()(torch.randn(3, D))[1]
    with pytest.raises(ConfigError, match="call train"):
        layer.auxiliary_loss(routing)
