"""Routers that read earlier than their experts: pre-gating and pre-attention."""

from dataclasses import replace

import pytest
import torch

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.batch import batch_of, batch_of_rows
from moeyard.moe.config.model import ModelConfig
from moeyard.moe.config.moe import MoEConfig
from moeyard.moe.folders.hf_config import from_hf, to_hf
from moeyard.moe.models.decoder import Decoder
from moeyard.moe.models.initialize import initialize
from moeyard.moe.routers.routing import Lookahead, RouterInput
from moeyard.moe.routers.topk import TopK

LOOKAHEADS = ["previous_block", "attention_input"]


def config(lookahead: str, **options) -> ModelConfig:
    router = TopK(k=2, lookahead=lookahead, **options)
    return ModelConfig(
        vocab_size=50,
        d_model=16,
        num_layers=4,
        num_heads=2,
        d_ff=24,
        dense_layers=(2,),
        moe=MoEConfig(num_experts=5, d_expert=12, router=router),
    )


def decoder(lookahead: str, **options) -> Decoder:
    model = Decoder(config(lookahead), **options)
    initialize(model, 3)
    return model.double()


def inputs_of(model: Decoder, ids) -> tuple[list, list, list]:
    """Run the model; return what each layer's attention and MLP read, and the routings."""
    residuals, mlp_inputs = [], []
    hooks = []
    for layer in model.layers:
        hooks.append(layer.register_forward_pre_hook(lambda _, a: residuals.append(a[0])))
        hooks.append(layer.mlp.register_forward_pre_hook(lambda _, a: mlp_inputs.append(a[0])))
    routings = model(batch_of_rows(ids)).routings
    for hook in hooks:
        hook.remove()
    return residuals, mlp_inputs, routings


def test_a_pre_gate_reads_what_the_experts_before_read_ids_and_weights_both():
    model = decoder("previous_block")
    ids = torch.randint(0, 50, (2, 9))
    _, mlp_inputs, routings = inputs_of(model, ids)
    gates = model.routers()
    assert [gate.lookahead.value for gate in gates] == [
        "ffn_input",
        "previous_block",
        "previous_block",
    ]
    # MoE layers are 0, 1 and 3: layer 2 is dense, so layer 3's router reads with layer 1's experts.
    for gate, routing, read in zip(gates, routings, (0, 0, 1), strict=True):
        expected = gate.route(RouterInput(mlp_inputs[read]))
        assert torch.equal(routing.experts_TK, expected.experts_TK)
        assert torch.equal(routing.weights_TK, expected.weights_TK)


def test_a_pre_attention_router_reads_the_raw_residual():
    model = decoder("attention_input")
    residuals, _, routings = inputs_of(model, torch.randint(0, 50, (2, 9)))
    for gate, routing, index in zip(model.routers(), routings, (0, 1, 3), strict=True):
        expected = gate.route(RouterInput(residuals[index]))
        assert torch.equal(routing.experts_TK, expected.experts_TK)
        assert torch.equal(routing.weights_TK, expected.weights_TK)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_cached_steps_give_the_rows_of_a_whole_forward(lookahead):
    model = decoder(lookahead).eval()
    ids = torch.randint(0, 50, (1, 12))
    whole = model(batch_of_rows(ids))
    cache = model.new_cache()
    parts = [model(batch_of([part], [cache])) for part in (ids[0, :5], *ids[0, 5:].split(1))]
    torch.testing.assert_close(torch.cat([part.hidden_TD for part in parts]), whole.hidden_TD)
    for layer, routing in enumerate(whole.routings):
        stepwise = torch.cat([part.routings[layer].experts_TK for part in parts])
        assert torch.equal(stepwise, routing.experts_TK)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_recompute_gives_the_same_gradients_and_counts(lookahead):
    ids = torch.randint(0, 50, (2, 9))
    found = []
    for recompute in (False, True):
        model = decoder(lookahead, recompute=recompute)
        output = model(batch_of_rows(ids))
        z = sum(routing.extras["z_sum"] for routing in output.routings)
        (output.hidden_TD.square().sum() + z).backward()
        assert all(int(routing.counts_E.sum()) == 2 * 9 * 2 for routing in output.routings)
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in found[0].items():
        if not name.startswith("lm_head"):
            assert grad.abs().sum() > 0, name
            assert torch.equal(grad, found[1][name]), name


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_experts_hear_of_a_choice_before_they_run(lookahead):
    """In the order of events: announcements, attention, experts."""
    model = decoder(lookahead).eval()
    events = []
    for index, layer in enumerate(model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, i=index: events.append(("attend", i)))
    for index, layer in model.moe_layers():
        layer.experts.announce = lambda _, i=index: events.append(("announce", i))
        layer.experts.register_forward_pre_hook(lambda *_, i=index: events.append(("run", i)))
    model(batch_of_rows(torch.zeros(1, 3, dtype=torch.int64)))
    for index, previous in ((1, 0), (3, 1)):
        announced = events.index(("announce", index))
        before = ("attend", index) if lookahead == "attention_input" else ("run", previous)
        assert announced < events.index(before) < events.index(("run", index))


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_the_configuration_survives_export_with_a_reason(lookahead):
    written = to_hf(config(lookahead, score="sigmoid"), "float32", {"eos_token_id": 0})
    assert written["model_type"] == "moeyard"
    assert lookahead in written["why_moeyard"]
    assert from_hf(written) == config(lookahead, score="sigmoid")


def test_pre_gating_needs_two_moe_layers():
    moe = MoEConfig(num_experts=4, d_expert=8, router=TopK(lookahead="previous_block"))
    with pytest.raises(ValueError, match=r"previous_block, but the model has 1 MoE layer"):
        ModelConfig(d_model=8, num_layers=1, num_heads=1, moe=moe)
    with pytest.raises(ValueError, match=r"previous_block, but the model has 1 MoE layer"):
        ModelConfig(d_model=8, num_layers=2, num_heads=1, moe=moe, dense_layers=(0,), d_ff=8)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_a_layer_alone_asks_for_the_earlier_choice(lookahead):
    layer = moeyard.MoELayer(8, 6, 4, TopK(k=2, lookahead=lookahead))
    x, earlier = torch.randn(5, 8), torch.randn(5, 8)
    with pytest.raises(ConfigError, match=f"lookahead is {lookahead}"):
        layer(x)
    routing = layer.gate.route(RouterInput(earlier))
    assert layer.lookahead is Lookahead(lookahead)
    assert torch.equal(layer(x, routing=routing)[1].experts_TK, routing.experts_TK)
    assert not torch.equal(
        layer(x, routing=routing)[0],
        layer(x, routing=replace(routing, weights_TK=routing.weights_TK * 2))[0],
    )
