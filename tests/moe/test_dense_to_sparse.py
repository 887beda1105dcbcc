"""Dense-to-sparse gates against their formulas. T tokens, D width, E experts."""

import dataclasses
import math

import pytest
import torch

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.routers.router import RouterSizes
from moeyard.moe.routers.routing import RouterInput

from router_shares import assert_shares_add_up, dense, loss_and_gradients

D, E = 6, 5


def build(layer=2, **fields):
    torch.manual_seed(0)
    gate = moeyard.router("dense_to_sparse", **fields).build(RouterSizes(D, E, layer=layer))
    return gate.double()


def rows(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(sum(lengths), D, generator=generator, dtype=torch.float64)
    keys = tuple(range(7, 7 + len(lengths)))
    return RouterInput(x_TD=x_TD, lengths=lengths, draw_keys=keys)


@torch.no_grad()
def by_hand(gate, x, noise, temperature):
    """One token's weights: the formula on plain numbers."""
    config, logits = gate.config, []
    for expert in range(E):
        score = sum(float(a * b) for a, b in zip(gate.weight[expert], x, strict=True))
        if config.activation == "gelu":
            score = score * 0.5 * (1 + math.erf(score / math.sqrt(2)))
        if config.activation == "tanh":
            score = math.tanh(score)
        if config.activation == "sigmoid":
            score = 1 / (1 + math.exp(-score))
        logits.append(score + (0.0 if gate.bias is None else float(gate.bias[expert])))
    powers = [math.exp((z + float(n)) / temperature) for z, n in zip(logits, noise, strict=True)]
    gates = [power / sum(powers) for power in powers]
    plain = [math.exp(z) for z in logits]
    weights = gates if config.weigh_by == "gate" else [power / sum(plain) for power in plain]
    return [w if g > config.threshold else 0.0 for w, g in zip(weights, gates, strict=True)]


@pytest.mark.parametrize("weigh_by", ["gate", "softmax"])
@pytest.mark.parametrize("activation", ["none", "gelu", "tanh", "sigmoid"])
def test_weights_are_those_of_the_formula(activation, weigh_by):
    gate = build(activation=activation, weigh_by=weigh_by, threshold=0.1, decay_steps=10)
    if gate.bias is not None:
        gate.bias.data.normal_()
    gate.step.fill_(4)
    given, temperature = rows(4, 3), 0.5**0.4
    noise_TE = gate._gumbel(given, 4)
    expected = [
        by_hand(gate, x, noise, temperature) for x, noise in zip(given.x_TD, noise_TE, strict=True)
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    assert 0 < int((expected == 0).sum()) < 7 * E  # the threshold leaves some out
    torch.testing.assert_close(dense(gate.route(given), E), expected)


def test_temperatures_reach_their_last_value_at_the_last_step_of_the_decay():
    exponential = build(first_temperature=2.0, last_temperature=0.5, decay_steps=4)
    linear = build(first_temperature=2.0, last_temperature=0.5, decay_steps=4, decay="linear")
    fall = [exponential.temperature(step) for step in (0, 2, 4, 9)]
    assert fall == pytest.approx([2, 1, 0.5, 0.5])
    fall = [linear.temperature(step) for step in (0, 2, 4, 9)]
    assert fall == pytest.approx([2, 1.25, 0.5, 0.5])


def test_a_new_gate_is_dense_then_sparser_then_takes_k():
    gate, given = build(k=2, decay_steps=10, last_temperature=0.05, hard_after=20), rows(30)
    mean = []
    for step in (0, 10, 20):
        gate.step.fill_(step)
        mean.append(float((gate.route(given).experts_TK >= 0).sum(1).double().mean()))
    assert mean[0] > 4.8 and 1 < mean[1] < 3 and mean[2] == 2


def test_the_argmax_with_noise_has_the_probabilities_of_the_softmax():
    gate = build(hard_after=0)
    x_TD = rows(1).x_TD.expand(20_000, D)
    given = RouterInput(x_TD=x_TD, lengths=(20_000,), draw_keys=(5,))
    shares_E = gate.route(given).counts_E / 20_000
    expected_E = gate.logits(x_TD[:1]).softmax(1)[0].detach()
    assert float((shares_E - expected_E).abs().max()) < 0.012  # 3.4 standard deviations


def test_noise_differs_by_step_sequence_layer_and_seed_only():
    gate, given = build(), rows(4, 3)
    noise = gate._gumbel(given, 0)
    assert torch.equal(noise, gate._gumbel(given, 0))
    others = [
        gate._gumbel(given, 1),
        build(layer=3)._gumbel(given, 0),
        build(seed=1)._gumbel(given, 0),
        gate._gumbel(dataclasses.replace(given, draw_keys=(70, 80)), 0),
    ]
    assert all((noise != other).any(dim=1).all() for other in others)


def test_evaluation_takes_the_k_largest_without_noise():
    gate, given = build(k=2, weigh_by="softmax").eval(), rows(9)
    routing = gate.route(given)
    values_TK, best_TK = gate.logits(given.x_TD).softmax(1).topk(2)
    assert torch.equal(routing.experts_TK, best_TK.sort(1).values.int())
    torch.testing.assert_close(routing.weights_TK.sum(1), values_TK.sum(1))
    dense_gate = build(k=2, dense_evaluation=True, hard_after=5).eval()
    assert dense_gate.route(given).experts_TK.shape[1] > 2
    dense_gate.step.fill_(5)
    assert dense_gate.route(given).experts_TK.shape[1] == 2


def test_the_balance_loss_is_that_of_its_formula():
    gate, given = build(noise=False, balance_loss=1.0), rows(6)
    gate.weight.data.zero_()
    value, _, _ = loss_and_gradients(gate, [given])
    assert float(value) == pytest.approx(E)  # every token visits all E experts with 1/E
    hard = build(noise=False, balance_loss=1.0, hard_after=0)
    value, _, counts = loss_and_gradients(hard, [given])
    weights_TE = dense(hard.route(given), E).detach()
    expected = sum(
        E * float(weights_TE[:, expert].mean()) * float(counts.counts_E[expert]) / 6
        for expert in range(E)
    )
    assert float(value) == pytest.approx(expected)


@pytest.mark.parametrize("hard_after", [None, 0])
def test_shares_of_two_ranks_add_up(hard_after):
    gate = build(activation="tanh", hard_after=hard_after)
    value, gradients = assert_shares_add_up(gate, rows(4, 2, 5))
    assert value > 0 and gradients["weight"].any() and gradients["bias"].any()


def test_a_temperature_does_not_rise():
    with pytest.raises(ConfigError, match=r"last_temperature is 3.0, but first_temperature is 1.0"):
        build(last_temperature=3.0)
