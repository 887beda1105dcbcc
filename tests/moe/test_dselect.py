"""DSelect-k against its formula, and what its limits promise.

T tokens, D width, E experts, K selectors, M bits.
"""

import math

import pytest
import torch

import moeyard
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput

from router_shares import assert_shares_add_up, dense, loss_and_gradients, step

D = 6


def build(num_experts=6, seed=0, spread=0.6, **fields):
    torch.manual_seed(seed)
    gate = moeyard.router("dselect", **fields).build(RouterSizes(D, num_experts)).double()
    for parameter in gate.parameters():
        parameter.data.normal_(std=spread)
    return gate


def rows(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(sum(lengths), D, generator=generator, dtype=torch.float64)
    return RouterInput(x_TD=x_TD, lengths=lengths)


@torch.no_grad()
def by_hand(gate, x, num_experts):
    """One token's weights, entropy and validity term."""
    num_bits = math.ceil(math.log2(num_experts))
    weights, entropy, invalid = [0.0] * num_experts, 0.0, 0.0
    mixing, bits = gate.mixing_bias, gate.bit_bias
    if gate.config.per_token:
        mixing, bits = mixing + gate.mixing_weight @ x, bits + gate.bit_weight @ x
    total = sum(math.exp(value) for value in mixing)
    for selector in range(gate.k):
        mass = 0.0
        for expert in range(num_experts):
            r = 1.0
            for place, digit in enumerate(format(expert, f"0{num_bits}b")):
                one = step(float(bits[selector * num_bits + place]), gate.config.gamma)
                r *= one if digit == "1" else 1 - one
            weights[expert] += math.exp(mixing[selector]) / total * r
            entropy -= r * math.log(r + 1e-6)
            mass += r
        invalid += 1 / (1e-6 + mass)
    return weights, entropy, invalid


@pytest.mark.parametrize("num_experts", [2, 5, 8])
@pytest.mark.parametrize("per_token", [True, False])
def test_weights_and_losses_are_those_of_the_formula(num_experts, per_token):
    gate = build(num_experts, k=2, gamma=2.0, per_token=per_token, entropy_loss=0.3)
    given = rows(4, 3)
    expected = [by_hand(gate, x, num_experts) for x in given.x_TD]
    weights = torch.tensor([weights for weights, _, _ in expected], dtype=torch.float64)
    torch.testing.assert_close(dense(gate.route(given), num_experts), weights)
    loss = 0.3 * sum(entropy for _, entropy, _ in expected) / 7
    if num_experts == 5:
        loss += sum(invalid for _, _, invalid in expected) / 7
    torch.testing.assert_close(float(loss_and_gradients(gate, [given])[0]), loss)


def test_decided_bits_send_a_token_to_at_most_k_experts():
    routing = build(8, k=2, gamma=1e-4).route(rows(50))
    counts = (routing.experts_TK >= 0).sum(1)
    assert int(counts.max()) <= 2 and int(counts.min()) >= 1
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(50).double())


def test_a_selector_without_an_expert_adds_nothing_and_its_penalty_leads_back():
    gate = build(5, k=1, gamma=1.0, per_token=False, entropy_loss=0.0)
    gate.bit_bias.data.copy_(torch.tensor([9.0, 9.0, 9.0]))  # expert 7 of 5
    assert (gate.route(rows(3)).experts_TK == -1).all()
    gate.bit_bias.data.copy_(torch.tensor([0.4, 0.4, 0.4]))  # almost
    _, gradients, _ = loss_and_gradients(gate, [rows(3)])
    assert (gradients["bit_bias"] > 0).all()  # descent lowers the bits


def test_static_gates_are_the_same_for_all_tokens_and_have_no_matrices():
    gate = build(8, k=2, per_token=False)
    weights_TE = dense(gate.route(rows(5)), 8)
    assert torch.equal(weights_TE, weights_TE[:1].expand(5, -1))
    assert {name for name, _ in gate.named_parameters()} == {"bit_bias", "mixing_bias"}


def test_a_new_router_visits_all_experts_about_equally():
    torch.manual_seed(0)
    gate = moeyard.router("dselect", k=2).build(RouterSizes(D, 8)).requires_grad_(False)
    routing = gate.route(rows(20))
    assert routing.experts_TK.shape == (20, 8)
    assert float((routing.weights_TK - 1 / 8).abs().max()) < 0.06


def test_all_parameters_have_a_gradient():
    gate, given = build(6, k=2, gamma=8.0), rows(4)
    routing = gate.route(given)
    (dense(routing, 6) * torch.randn(6)).sum().backward()
    assert all(parameter.grad.any() for parameter in gate.parameters())


@pytest.mark.parametrize("per_token", [True, False])
def test_shares_of_two_ranks_add_up(per_token):
    gate = build(6, gamma=3.0, per_token=per_token)
    value, gradients = assert_shares_add_up(gate, rows(4, 2, 5))
    assert value > 0 and gradients["bit_bias"].any() and gradients["mixing_bias"] is None
    gate = build(6, gamma=3.0, per_token=per_token, importance_loss=0.1)
    more, gradients = assert_shares_add_up(gate, rows(4, 2, 5), tolerance=1e-9)
    sums_E = dense(gate.route(rows(4, 2, 5)), 6).detach().sum(0)
    variation = float(sums_E.var() / sums_E.mean() ** 2)
    assert float(more - value) == pytest.approx(0.1 * variation) and gradients["mixing_bias"].any()
