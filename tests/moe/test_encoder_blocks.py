"""Blocks in an encoder: the state goes from MoE layer to MoE layer, past dense ones."""

import numpy as np
import pytest
import torch

from moeyard.moe.config.encoder import EncoderConfig
from moeyard.moe.models.documents import batch_of_lengths
from moeyard.moe.models.initialize import initialize
from moeyard.moe.models.options import ModelOptions
from moeyard.moe.models.table import build_model

LENGTHS = (5, 1, 17, 9)
SIZES = {"d_model": 32, "num_layers": 4, "num_heads": 4, "d_ff": 44, "vocab_size": 50}
MOE = {"num_experts": 6, "d_expert": 20, "router": {"kind": "topk", "k": 2}}


def encoder(block, recompute=False):
    config = EncoderConfig(
        **SIZES, labels=("a", "b"), dense_layers=(2,), moe=MOE | {"block": block}
    )
    model = build_model(config, ModelOptions(backend="reference", recompute=recompute))
    initialize(model, seed=3)
    return model.double()


def rows_and_gradients(model):
    ids_T = torch.randint(5, 50, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    hidden_TD = model(batch_of_lengths(ids_T, np.array(LENGTHS))).hidden_TD
    model.logits(hidden_TD, LENGTHS).square().sum().backward()
    return hidden_TD.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_equal(found, expected):
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] is None) == (gradient is None), name
        assert gradient is None or torch.equal(found[1][name], gradient), name


def test_momentum_of_0_is_the_plain_encoder_bit_for_bit():
    plain = rows_and_gradients(encoder({"kind": "residual"}))
    assert_equal(rows_and_gradients(encoder({"kind": "momentum", "mu": 0, "gamma": 1})), plain)


@pytest.mark.parametrize("kind", ["momentum", "adam", "robust"])
def test_a_state_changes_the_rows_and_recompute_changes_nothing(kind):
    plain, _ = rows_and_gradients(encoder({"kind": "residual"}))
    kept = rows_and_gradients(encoder({"kind": kind}))
    assert (kept[0] - plain).abs().max() > 1e-3
    assert_equal(rows_and_gradients(encoder({"kind": kind}, recompute=True)), kept)


def test_momentum_is_the_formula():
    """After the first MoE layer ``m = y``, after the next one ``m = mu m + y``."""
    model = encoder({"kind": "momentum", "mu": 0.5, "gamma": 1}).eval()
    seen = []
    for _, layer in model.moe_layers():
        layer.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    joined = []
    for layer in model.layers:
        layer.output_norm.register_forward_pre_hook(lambda _, given: joined.append(given[0]))
    ids_T = torch.arange(5, 5 + sum(LENGTHS)) % 50
    read = []
    for layer in model.layers:
        layer.attention_norm.register_forward_hook(lambda _, __, output: read.append(output))
    with torch.no_grad():
        model(batch_of_lengths(ids_T, np.array(LENGTHS)))
    first, second, third = seen
    m_TD = [first, 0.5 * first + second, 0.25 * first + 0.5 * second + third]
    for layer, expected_TD in zip((0, 1, 3), m_TD, strict=True):
        torch.testing.assert_close(joined[layer] - read[layer], expected_TD, rtol=1e-9, atol=1e-12)
