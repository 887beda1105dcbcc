"""Rows that use some channels of their experts: the bits of weights of 0, which are not read."""

import pytest
import torch
from test_channel_experts import ROWS, WIDTH, E, by_channel, needs_cpp, plain, routed, same_bits

from moeyard.kernels.cpu.experts import CppWaves
from moeyard.kernels.torch_ops.experts import TorchWaves
from moeyard.kernels.values.activation import gated
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.row_channels import RowChannels


@torch.no_grad()
def run(rows, experts, channels=None):
    waves = CppWaves(*rows, channels)
    waves.add(experts)
    return waves.result()


def used_by(rows, seed=3, share=0.5):
    shape = (rows[1].numel(), WIDTH)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def without(experts, unused_F):
    """Return the experts with 0 in the columns of down of some channels."""
    fc2_SDF = experts.fc2_SDF.clone()
    fc2_SDF[:, :, unused_F] = 0
    parts = (experts.fc1_SHD, fc2_SDF, experts.fc1_bias_SH, experts.fc2_bias_SD)
    return ExpertWeights.of([p for p in parts if p is not None], activation=experts.activation)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["swiglu", "reglu", "clamped_swiglu", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
def test_each_row_has_the_bits_of_its_own_channels_alone(dtype, activation, bias):
    experts = plain(dtype, activation, bias)
    stored = by_channel(experts, by_input=False)
    for num_rows in ROWS:
        rows = routed(num_rows, dtype, seed=num_rows)
        everything = torch.ones(rows[1].numel(), WIDTH, dtype=torch.bool)
        whole = run(rows, stored, RowChannels(everything))
        assert same_bits(whole, run(rows, experts)), num_rows
        used_RF = used_by(rows)
        num_choices = rows[1].shape[1]
        # One set for all choices of a token, so that one model can be its reference.
        used_RF = used_RF[::num_choices].repeat_interleave(num_choices, dim=0)
        found = run(rows, stored, RowChannels(used_RF))
        for token in range(num_rows):
            one = tuple(part[token : token + 1] for part in rows)
            expected = run(one, without(experts, ~used_RF[token * num_choices]))
            assert same_bits(found[token : token + 1], expected), (num_rows, token)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_that_no_row_uses_are_not_read(dtype):
    experts = plain(dtype, "swiglu")
    rows = (routed(1, dtype)[0], torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    used_1F = used_by(rows)
    before = run(rows, by_channel(experts, by_input=False), RowChannels(used_1F))
    unused_F = ~used_1F[0]
    experts.fc1_SHD[0, :WIDTH][unused_F] = float("nan")
    experts.fc1_SHD[0, WIDTH:][unused_F] = float("nan")
    experts.fc2_SDF[0][:, unused_F] = float("nan")
    after = run(rows, by_channel(experts, by_input=False), RowChannels(used_1F))
    assert same_bits(after, before)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_input", [False, True])
def test_the_channels_come_out_row_by_row(dtype, by_input):
    experts = plain(dtype, "swiglu", bias=True)
    rows = routed(29, dtype)
    rows[1][5, 1] = -1
    act_RF = torch.zeros(rows[1].numel(), WIDTH, dtype=dtype)
    stored = by_channel(experts, by_input)
    result = run(rows, stored, RowChannels(act_RF=act_RF))
    assert same_bits(result, run(rows, experts))
    x_RD = rows[0].float().repeat_interleave(rows[1].shape[1], dim=0)
    for expert in range(E):
        here_R = (rows[1] == expert).flatten()
        fc1_HD, bias_H = experts.fc1_SHD[expert].float(), experts.fc1_bias_SH[expert].float()
        expected = gated(torch.nn.functional.linear(x_RD[here_R], fc1_HD, bias_H), "swiglu")
        close = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(act_RF[here_R].float(), expected, **close)
    assert not act_RF[5 * 2 + 1].any()
    few = torch.zeros(2, WIDTH, dtype=dtype)
    run(tuple(part[3:4] for part in rows), stored, RowChannels(act_RF=few))
    assert same_bits(few, act_RF[6:8])


@needs_cpp
@torch.no_grad()
def test_torch_computes_the_same():
    experts = by_channel(plain(torch.float32, "swiglu", bias=True), by_input=False)
    rows = routed(29, torch.float32)
    used_RF, results, acts = used_by(rows), [], []
    for waves_of in (CppWaves, lambda *given: TorchWaves(*given[:3], E, given[3])):
        act_RF = torch.zeros(rows[1].numel(), WIDTH)
        waves = waves_of(*rows, RowChannels(used_RF, act_RF))
        waves.add(experts, only=[0, 2])
        waves.add(experts, only=[1])
        results.append(waves.result())
        acts.append(act_RF)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*acts, rtol=1e-4, atol=1e-5)
    assert not acts[0][~used_RF].any()


@needs_cpp
def test_channels_that_do_not_fit_are_refused():
    experts, rows = by_channel(plain(torch.float32, "swiglu"), False), routed(3, torch.float32)
    for wrong in (RowChannels(torch.ones(6, WIDTH)), RowChannels(act_RF=torch.ones(5, WIDTH))):
        with pytest.raises(ValueError, match="channels are"):
            run(rows, experts, wrong)
