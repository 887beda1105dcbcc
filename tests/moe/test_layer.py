"""The MoE layer on its own."""

import pytest
import torch

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.routers.hash import Hash


def test_gives_the_promised_shapes_and_routes_every_token():
    layer = moeyard.MoELayer(
        d_model=32, d_expert=16, num_experts=8, router=moeyard.TopK(k=4), activation="swiglu"
    )
    x_BTD = torch.randn(2, 7, 32)
    y_BTD, routing = layer(x_BTD)
    assert y_BTD.shape == x_BTD.shape
    assert routing.experts_TK.shape == (14, 4) and int(routing.counts_E.sum()) == 56


def test_takes_a_choice_made_earlier():
    layer = moeyard.MoELayer(32, 16, 8, moeyard.TopK(k=2))
    x = torch.randn(3, 5, 32)
    y, routing = layer(x)
    other = layer.gate.route(moeyard.moe.routers.routing.RouterInput(torch.randn(15, 32)))
    assert torch.equal(layer(x, routing=routing)[0], y)
    assert not torch.equal(layer(x, routing=other)[0], y)


def test_sums_the_weighted_experts_and_the_shared_expert():
    layer = moeyard.MoELayer(8, 6, 4, moeyard.TopK(k=2), d_shared=10).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    y, routing = layer(x)
    silu = torch.nn.functional.silu
    for t in range(5):
        expected = layer.shared_expert(x[t])
        for e, w in zip(routing.experts_TK[t].tolist(), routing.weights_TK[t], strict=True):
            h = layer.experts.fc1[e] @ x[t]
            expected = expected + w * (layer.experts.fc2[e] @ (silu(h[:6]) * h[6:]))
        torch.testing.assert_close(y[t], expected)


def test_biases_of_experts_are_zeros_at_first_and_belong_to_the_expert():
    torch.manual_seed(0)
    layer = moeyard.MoELayer(8, 6, 4, moeyard.TopK(k=2), expert_bias=True).double()
    experts = layer.experts
    assert experts.fc1_bias.shape == (4, 12) and experts.fc2_bias.shape == (4, 8)
    assert not experts.fc1_bias.any() and not experts.fc2_bias.any()
    for slot, views in enumerate(experts.slot_views()):
        for number, part in enumerate(("gate_bias", "up_bias", "down_bias")):
            views[part].copy_(torch.linspace(-1, 1, len(views[part])) + slot + number)
    x = torch.randn(5, 8, dtype=torch.float64)
    y, routing = layer(x)
    silu = torch.nn.functional.silu
    for t in range(5):
        expected = torch.zeros(8, dtype=torch.float64)
        for e, w in zip(routing.experts_TK[t].tolist(), routing.weights_TK[t], strict=True):
            h = experts.fc1[e] @ x[t] + experts.fc1_bias[e]
            out = experts.fc2[e] @ (silu(h[:6]) * h[6:]) + experts.fc2_bias[e]
            expected = expected + w * out
        torch.testing.assert_close(y[t], expected)
    plain = moeyard.MoELayer(8, 6, 4, moeyard.TopK(k=2)).experts
    assert [name for name, _ in plain.named_parameters()] == ["fc1", "fc2"]
    assert "gate_bias" not in plain.slot_views()[0]


def test_hash_routing_needs_token_ids():
    layer = moeyard.MoELayer(8, 6, 4, Hash(k=1, table="random"), vocab_size=20)
    y, _ = layer(torch.randn(2, 3, 8), token_ids=torch.randint(0, 20, (2, 3)))
    assert y.shape == (2, 3, 8)
    with pytest.raises(ConfigError, match="pass token_ids"):
        layer(torch.randn(2, 3, 8))


def test_rows_that_are_not_valid_get_nothing():
    layer = moeyard.MoELayer(8, 6, 4)
    valid = torch.tensor([[True, False, True]])
    y, routing = layer(torch.randn(1, 3, 8), valid=valid)
    assert (y[0, 1] == 0).all() and (y[0, 0] != 0).any()
    assert int(routing.counts_E.sum()) == 4
