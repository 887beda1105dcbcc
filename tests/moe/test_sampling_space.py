"""Sampling-space experts: even random splits, an exchange of weights, and one MLP afterwards."""

import copy

import pytest
import torch

import moeyard
from moeyard.moe.exchange import exchange_experts, refill_averages
from moeyard.moe.experts.resident import Experts
from moeyard.moe.routers.routing import Lookahead, RouterInput
from moeyard.moe.routers.sampling_space import SamplingSpace, SamplingSpaceRouter
from moeyard.parallel.mesh import Mesh
from moeyard.training.config import RunConfig
from moeyard.training.optimizers.adamw import AdamWConfig
from moeyard.training.optimizers.table import open_optimizer

import pictures


def rows(lengths=(8, 10), keys=(5, 6)) -> RouterInput:
    ids_T = torch.zeros(sum(lengths), dtype=torch.int64)
    return RouterInput(ids_T=ids_T, lengths=lengths, draw_keys=keys)


def layer_of(**fields) -> moeyard.MoELayer:
    torch.manual_seed(0)
    config = SamplingSpace(**fields)
    layer = moeyard.MoELayer(6, 4, 4, config, backend="reference").double()
    refill_averages([layer])
    return layer


def test_every_image_is_split_evenly_and_at_random():
    gate = SamplingSpaceRouter(SamplingSpace(), 4)
    assert gate.lookahead is Lookahead.TOKEN
    first, second = gate.route(rows()).experts_TK.flatten().split([8, 10])
    assert first.bincount().tolist() == [2, 2, 2, 2]
    assert sorted(second.bincount().tolist()) == [2, 2, 3, 3]
    assert first.tolist() != sorted(first.tolist())
    gate.after_step(None, ())
    assert gate.route(rows()).experts_TK[:8].flatten().tolist() != first.tolist()


def test_a_split_depends_on_the_image_the_layer_and_the_step_alone():
    gate = SamplingSpaceRouter(SamplingSpace(), 4)
    found = gate.route(rows()).experts_TK
    assert torch.equal(gate.route(rows((10,), (6,))).experts_TK, found[8:])
    other = SamplingSpaceRouter(SamplingSpace(), 4, layer=1).route(rows()).experts_TK
    assert not torch.equal(other, found)


def test_padding_visits_no_expert():
    gate = SamplingSpaceRouter(SamplingSpace(), 2)
    valid_T = torch.tensor([True, True, False, True])
    routing = gate.route(RouterInput(ids_T=torch.zeros(4).long(), valid_T=valid_T))
    assert routing.experts_TK[2] == -1 and int(routing.num_tokens) == 3


def test_outside_training_the_layer_is_one_mlp_with_the_mean_of_the_weights():
    layer, x_TD = layer_of().eval(), torch.randn(5, 6, dtype=torch.float64)
    y_TD, routing = layer(x_TD)
    assert (routing.experts_TK == -1).all() and routing.counts_E.tolist() == [0] * 4
    fc1, fc2 = layer.experts.fc1.mean(dim=0), layer.experts.fc2.mean(dim=0)
    gate_TF, up_TF = (x_TD @ fc1.T).chunk(2, dim=1)
    wanted = (torch.nn.functional.silu(gate_TF) * up_TF) @ fc2.T
    torch.testing.assert_close(y_TD, wanted)
    mean_of_outputs = torch.zeros_like(y_TD)
    for expert in range(4):
        one = Experts(6, 4, 1, backend="reference").double()
        one.fc1.data, one.fc2.data = layer.experts.fc1[[expert]], layer.experts.fc2[[expert]]
        ids = torch.zeros(5, 1, dtype=torch.int32)
        mean_of_outputs += one(x_TD, ids, torch.ones(5, 1)) / 4
    assert (y_TD - mean_of_outputs).abs().max() > 1e-3  # it is not that


def test_an_exchange_is_that_of_the_paper_in_place_and_keeps_the_mean():
    layer = layer_of(exchange=0.3, exchange_steps=10)
    parameter = layer.experts.fc1
    before = parameter.detach().clone()
    exchange_experts([layer], done=5)
    assert layer.experts.fc1 is parameter  # the optimizer's
    for expert in range(4):
        others = before[[e for e in range(4) if e != expert]].sum(dim=0)
        wanted = (1 - 0.15) * before[expert] + 0.15 / 3 * others
        torch.testing.assert_close(parameter.detach()[expert], wanted)
    torch.testing.assert_close(layer.average.fc1, before.mean(dim=0))


def test_the_weight_of_the_others_grows_to_its_end():
    config = SamplingSpace(exchange=0.4, exchange_steps=8)
    assert [config.exchange_after(done) for done in (0, 2, 8, 99)] == [0, 0.1, 0.4, 0.4]
    assert SamplingSpace(exchange_steps=0).exchange_after(1) == 0.3


def test_the_optimizer_exchanges_masters_after_its_step():
    """One step with exchange is a step without, then the exchange."""
    results = []
    for weight in (0.0, 0.6):
        layer = layer_of(exchange=weight, exchange_steps=0)
        for parameter in layer.parameters():
            parameter.main_grad = torch.ones_like(parameter)
        optimizer = open_optimizer(AdamWConfig(), layer, {}, Mesh(), seed=0)
        optimizer.step(0.01)
        results.append(layer)
    without, with_ = results
    exchange_experts([copied := copy.deepcopy(without)], done=1)
    assert copied.average is not None
    mean = without.experts.fc1.mean(dim=0)
    torch.testing.assert_close(with_.average.fc1, mean.detach())
    share = 0.6 * 4 / 3
    wanted = without.experts.fc1 + share * (mean - without.experts.fc1)
    torch.testing.assert_close(with_.experts.fc1, wanted)


def test_masters_of_narrow_parameters_take_part():
    layer = layer_of(exchange=0.6, exchange_steps=0).bfloat16()
    masters = {n: p.detach().float() for n, p in layer.named_parameters()}
    kept = {n: m.clone() for n, m in masters.items()}
    for parameter in layer.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    open_optimizer(AdamWConfig(weight_decay=0), layer, masters, Mesh(), seed=0).step(0.1)
    mean = kept["experts.fc2"].mean(dim=0)
    wanted = kept["experts.fc2"] + 0.8 * (mean - kept["experts.fc2"])
    torch.testing.assert_close(masters["experts.fc2"], wanted)
    assert torch.equal(layer.experts.fc2, masters["experts.fc2"].bfloat16())
    assert layer.average.fc2.dtype == torch.float32
    torch.testing.assert_close(layer.average.fc2, mean)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"expert_tp": 2}}, "parallel.expert_tp is given, but experts of sampling_sp"),
        ({"optimizer": {"shard_experts": True}}, "optimizer.shard_experts is given, but experts"),
        ({"train": {"steps": 1, "sparse_experts": {}}}, "train.sparse_experts is given, but exp"),
        (
            {"model": {"d_model": 16}},
            "sampling_space, whose experts share out the rows of an image",
        ),
    ],
)
def test_runs_that_cannot_exchange_are_refused(changes, message):
    text = {
        "d_model": 16,
        "num_layers": 1,
        "num_heads": 2,
        "moe": {"num_experts": 4, "d_expert": 8, "router": {"kind": "sampling_space"}},
    }
    values = {"run_dir": "x", "model": pictures.MODEL, "train": {"steps": 1}} | changes
    values["data"] = {"format": "super_resolution", "source": "x.npz"}
    if "model" in changes:
        values |= {"model": text, "data": {}}
    with pytest.raises(ValueError, match=message):
        RunConfig(**values)
