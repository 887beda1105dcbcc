"""Which channels rows need: judged by gates alone, in agreement with the kernel that computes."""

import pytest
import torch

from moeyard.kernels.cpu.experts import CppWaves
from moeyard.kernels.live_channels import live_channels
from moeyard.kernels.trust import cpp
from moeyard.kernels.values.channel_weights import (
    ChannelExpertWeights,
    ChannelLimits,
    empty_channel_slots,
)

pytestmark = pytest.mark.skipif(cpp().functions is None, reason="there are no C++ kernels")
E, K, D, WIDTH = 4, 2, 70, 300
"""Widths that are no multiples of vectors or tasks."""


def random_experts(dtype, activation="reglu", limits=None):
    generator = torch.Generator().manual_seed(1)
    fc1, fc2_SFD = empty_channel_slots(E, D, WIDTH, False, dtype, activation)
    for part in (fc1, fc2_SFD):
        part.copy_(torch.randn(part.shape, generator=generator) * 0.2)
    return ChannelExpertWeights(fc1, fc2_SFD, activation=activation, limits=limits)


def routed(num_rows, dtype):
    generator = torch.Generator().manual_seed(num_rows)
    x_TD = torch.randn(num_rows, D, generator=generator).to(dtype)
    weights_TK, experts_TK = torch.rand(num_rows, E, generator=generator).topk(K)
    return x_TD, experts_TK.int(), weights_TK


@torch.inference_mode()
def lines(rows, experts, only):
    waves = CppWaves(*rows)
    waves.add(experts, only=only)
    chosen_r = torch.isin(rows[1].flatten(), torch.tensor(only)).nonzero().flatten()
    return waves.lines(chosen_r)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 3, 29, 250])
@pytest.mark.parametrize("score", [None, 0.3])
def test_channels_that_no_row_needs_may_hold_anything_finite(dtype, num_rows, score):
    limits = None
    if score is not None:
        limits = ChannelLimits(gate_EF=torch.full((E, WIDTH), score))
    experts = random_experts(dtype, "reglu" if score is None else "swiglu", limits)
    rows, only = routed(num_rows, dtype), [3, 0]
    expected = lines(rows, experts, only)
    with torch.inference_mode():
        live_nF = live_channels(rows[0], rows[1], experts, only)
    for live_F, expert in zip(live_nF, only, strict=True):
        experts.fc1[expert, WIDTH:][~live_F] = 1000.0
        experts.fc2_SFD[expert][~live_F] = -7.0
    assert torch.equal(lines(rows, experts, only), expected)
    assert num_rows > 3 or 0 < int(live_nF.sum()) < 0.9 * live_nF.numel()


def test_no_more_channels_are_named_than_some_row_needs():
    """In fp32 the gates of torch agree, but for values next to 0."""
    experts, (x_TD, experts_TK, _) = random_experts(torch.float32), routed(5, torch.float32)
    with torch.inference_mode():
        live_nF = live_channels(x_TD, experts_TK, experts, range(E))
    for expert in range(E):
        x_nD = x_TD[(experts_TK == expert).any(dim=1)]
        gates_nF = x_nD.double() @ experts.fc1[expert, :WIDTH].double().mT
        assert torch.equal(live_nF[expert], (gates_nF > 0).any(dim=0))


def test_a_gate_that_is_not_finite_needs_its_channel():
    experts, (x_TD, experts_TK, _) = random_experts(torch.float32), routed(3, torch.float32)
    experts.fc1[:, 5] = torch.nan
    with torch.inference_mode():
        assert live_channels(x_TD, experts_TK, experts, range(E))[:, 5].all()
