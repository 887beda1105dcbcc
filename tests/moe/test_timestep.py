"""The router of a diffusion process's time (SS-MoE)."""

import pytest
import torch

import moeyard
from moeyard.errors import ConfigError
from moeyard.moe.routers.routing import Lookahead, RouterInput
from moeyard.moe.routers.timestep import Timestep, TimestepRouter


def test_every_expert_has_an_interval_of_equal_length():
    gate = TimestepRouter(Timestep(), 4)
    assert gate.lookahead is Lookahead.TOKEN
    times_T = torch.arange(1001)
    routing = gate.route(RouterInput(timesteps_T=times_T))
    assert routing.experts_TK.flatten().tolist() == [min(t // 250, 3) for t in range(1001)]
    assert (routing.weights_TK == 1).all()
    assert routing.counts_E.tolist() == [250, 250, 250, 251]


def test_time_may_be_continuous():
    gate = TimestepRouter(Timestep(num_timesteps=1.0), 3)
    times_T = torch.tensor([0.0, 0.33, 0.34, 0.66, 0.67, 1.0])
    found = gate.route(RouterInput(timesteps_T=times_T)).experts_TK.flatten().tolist()
    assert found == [0, 0, 1, 1, 2, 2]


def test_a_layer_computes_the_expert_of_the_time():
    layer = moeyard.MoELayer(6, 4, 4, Timestep(), backend="reference").double()
    x_TD = torch.randn(3, 6, dtype=torch.float64)
    y_TD, _ = layer(x_TD, timesteps=torch.tensor([10, 999, 500]))
    for x_D, y_D, expert in zip(x_TD, y_TD, (0, 3, 2), strict=True):
        gate_F, up_F = (layer.experts.fc1[expert] @ x_D).chunk(2)
        wanted = layer.experts.fc2[expert] @ (torch.nn.functional.silu(gate_F) * up_F)
        torch.testing.assert_close(y_D, wanted)


def test_times_that_are_missing_or_outside_get_one_sentence():
    gate = TimestepRouter(Timestep(), 4)
    with pytest.raises(ConfigError, match="reads each token's timestep; pass timesteps"):
        gate.route(RouterInput(torch.ones(2, 3)))
    with pytest.raises(ConfigError, match="timesteps has 1001; use numbers from 0 to 1000"):
        gate.route(RouterInput(timesteps_T=torch.tensor([3, 1001])))
    with pytest.raises(ConfigError, match="timesteps has nan"):
        gate.route(RouterInput(timesteps_T=torch.tensor([3, torch.nan])))
    with pytest.raises(ConfigError, match=r"router\.k: it is 2, but should be less"):
        moeyard.router("timestep", k=2)
    valid_T = torch.tensor([True, False])
    routing = gate.route(RouterInput(timesteps_T=torch.tensor([3, -7]), valid_T=valid_T))
    assert routing.experts_TK.tolist() == [[0], [-1]]


def test_it_compiles_to_one_graph():
    gate = TimestepRouter(Timestep(), 4)
    compiled = torch.compile(
        lambda t: gate.route(RouterInput(timesteps_T=t)).experts_TK, fullgraph=True, backend="eager"
    )
    assert compiled(torch.tensor([3, 800])).tolist() == [[0], [3]]
