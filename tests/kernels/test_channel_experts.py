"""Experts whose channels are not read where they count as 0: the same bits, in every layout."""

import pytest
import torch

from moeyard.kernels.cpu.experts import CppWaves
from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.trust import cpp
from moeyard.kernels.values.activation import ACTIVATIONS, UNGATED, fc1_rows
from moeyard.kernels.values.channel_weights import (
    ChannelExpertWeights,
    ChannelLimits,
    empty_channel_slots,
    gate_values,
)
from moeyard.kernels.values.expert_weights import ExpertWeights

needs_cpp = pytest.mark.skipif(cpp().functions is None, reason="there are no C++ kernels")
E, K, D, WIDTH = 3, 2, 70, 45
"""Widths that are no multiples of vectors, pairs or panels."""
ROWS = (1, 3, 29)


def plain(dtype, activation, bias=False, d_model=D, width=WIDTH):
    generator = torch.Generator().manual_seed(1)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    d_hidden = fc1_rows(width, activation)
    biases = (random(E, d_hidden), random(E, d_model)) if bias else ()
    fc1, fc2 = random(E, d_hidden, d_model, scale=0.2), random(E, d_model, width, scale=0.2)
    return ExpertWeights.of((fc1, fc2, *biases), activation=activation)


def by_channel(experts, by_input, limits=None):
    """Return the same experts, stored by channel and filled through their views."""
    d_model, width = experts.fc2_SDF.shape[1:]
    sizes = (E, d_model, width, by_input)
    parts = empty_channel_slots(*sizes, experts.fc1_SHD.dtype, experts.activation)
    found = ChannelExpertWeights(
        *parts,
        by_input=by_input,
        activation=experts.activation,
        limits=limits,
        fc1_bias_SH=experts.fc1_bias_SH,
        fc2_bias_SD=experts.fc2_bias_SD,
    )
    for slot in range(E):
        for part, view in found.slot_views(slot).items():
            view.copy_(experts.slot_views(slot)[part])
    return found


def routed(num_rows, dtype, d_model=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_rows, d_model, generator=generator).to(dtype)
    scores_TE = torch.rand(num_rows, E, generator=generator)
    weights_TK, experts_TK = scores_TE.topk(K)
    return x_TD, experts_TK.int(), weights_TK


@torch.no_grad()
def run(rows, experts):
    waves = CppWaves(*rows)
    waves.add(experts)
    return waves.result()


def same_bits(a, b):
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(kind), b.view(kind))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("by_input", [False, True])
def test_without_limits_the_bits_are_those_of_plain_experts(dtype, activation, by_input):
    for bias in (False, True):
        experts = plain(dtype, activation, bias)
        other = by_channel(experts, by_input)
        for num_rows in ROWS:
            rows = routed(num_rows, dtype, seed=num_rows)
            assert same_bits(run(rows, other), run(rows, experts)), (num_rows, bias)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [300, 513])
def test_wide_experts_have_the_same_bits(dtype, width):
    """Several tasks for one row, and several panels."""
    experts = plain(dtype, "reglu", d_model=332, width=width)
    for by_input in (False, True):
        other = by_channel(experts, by_input)
        for num_rows in (1, 40):
            rows = routed(num_rows, dtype, d_model=332)
            assert same_bits(run(rows, other), run(rows, experts))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu_experts_do_not_depend_on_what_they_skip(dtype):
    """Weights of channels that no gate opens may be anything finite: they are not read."""
    experts = plain(dtype, "reglu")
    x_TD = routed(1, dtype)[0]
    experts_TK, weights_TK = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    closed_F = (x_TD.float() @ experts.fc1_SHD[0, :WIDTH].float().mT)[0] < -0.05
    assert closed_F.sum() > WIDTH // 4
    before = run((x_TD, experts_TK, weights_TK), experts)
    experts.fc1_SHD[0, WIDTH:][closed_F] = float("nan")
    assert same_bits(run((x_TD, experts_TK, weights_TK), experts), before)
    experts.fc2_SDF[0][:, closed_F] = float("nan")
    skipped = run((x_TD, experts_TK, weights_TK), by_channel(experts, by_input=False))
    assert same_bits(skipped, before)


@needs_cpp
def test_a_gate_that_is_not_a_number_stays_visible():
    experts = by_channel(plain(torch.float32, "reglu"), by_input=False)
    x_TD, experts_TK, weights_TK = routed(1, torch.float32)
    x_TD[0, 3] = float("nan")
    assert run((x_TD, experts_TK, weights_TK), experts).isnan().all()


def limits_for(experts, share, names):
    """Return limits that cut about ``share`` of the values of each named kind."""
    x_ND = torch.randn(200, experts.d_model, generator=torch.Generator().manual_seed(2))
    found = {}
    for name in names:
        kept = []
        for expert in range(E):
            fc1_HD = experts.fc1_SHD[expert].float()
            h_NH = x_ND @ fc1_HD.mT
            gate_NF = gate_values(h_NH, experts.activation)
            up_NF = 1 if experts.activation in UNGATED else h_NH[:, WIDTH:]
            values = {"x_ED": x_ND, "gate_EF": gate_NF, "act_EF": gate_NF * up_NF}[name]
            kept.append(values.abs().quantile(share, dim=0))
        found[name] = torch.stack(kept).contiguous()
    return ChannelLimits(**found)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [("x_ED",), ("gate_EF",), ("act_EF",), ("x_ED", "act_EF")])
def test_limits_of_zero_give_the_dense_bits(dtype, names):
    experts = plain(dtype, "swiglu")
    limits = limits_for(experts, 0.5, names)
    zero = ChannelLimits(
        **{name: torch.zeros_like(getattr(limits, name)) for name in names},
    )
    for num_rows in ROWS:
        rows = routed(num_rows, dtype)
        for by_input in (False, True):
            other = by_channel(experts, by_input, zero)
            assert same_bits(run(rows, other), run(rows, experts))


@needs_cpp
@pytest.mark.parametrize("names", [("x_ED",), ("gate_EF",), ("act_EF",), ("x_ED", "act_EF")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_limits_do_what_the_reference_does(names, activation):
    experts = plain(torch.float32, activation, bias=activation == "clamped_swiglu")
    limits = limits_for(experts, 0.7, names)
    for num_rows in ROWS:
        rows = routed(num_rows, torch.float32)
        other = by_channel(experts, "x_ED" in names, limits)
        found, torchs, expected = (
            run(rows, other),
            expert_mlp(*rows, other, "torch"),
            expert_mlp(*rows, other, "reference"),
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torchs, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, run(rows, experts), rtol=1e-3)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_below_its_limit_counts_as_zero(dtype):
    """The sparse product is the dense one of masked values, bit for bit."""
    experts = plain(dtype, "swiglu")
    limits_ED = limits_for(experts, 0.5, ("x_ED",)).x_ED
    for num_rows in ROWS:
        x_TD = routed(num_rows, dtype)[0]
        for expert in range(E):
            experts_TK = torch.full((num_rows, 1), expert, dtype=torch.int32)
            weights_TK = torch.ones(num_rows, 1)
            masked_TD = torch.where(x_TD.float().abs() <= limits_ED[expert], 0, x_TD)
            assert (masked_TD == 0).float().mean() > 0.3
            other = by_channel(experts, True, ChannelLimits(x_ED=limits_ED))
            found = run((x_TD, experts_TK, weights_TK), other)
            assert same_bits(found, run((masked_TD, experts_TK, weights_TK), experts))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_the_other_rows(dtype):
    experts = plain(dtype, "swiglu")
    limits = limits_for(experts, 0.5, ("gate_EF", "act_EF"))
    other = by_channel(experts, False, limits)
    rows = routed(29, dtype)
    together = run(rows, other)
    for number in range(0, 29, 4):
        one = run(tuple(part[number : number + 1] for part in rows), other)
        assert same_bits(one[0], together[number])


def test_wrong_limits_and_shapes_are_refused():
    experts = plain(torch.float32, "swiglu")
    with pytest.raises(ValueError, match="fc1 must be"):
        ChannelExpertWeights(experts.fc1_SHD, experts.fc2_SDF)
    with pytest.raises(ValueError, match="limits are"):
        by_channel(experts, False, ChannelLimits(gate_EF=torch.zeros(E, WIDTH + 1)))
    with pytest.raises(ValueError, match="fp32 and dense"):
        by_channel(experts, False, ChannelLimits(x_ED=torch.zeros(E, D, dtype=torch.float64)))
    x_TD, experts_TK, weights_TK = routed(2, torch.float32)
    with pytest.raises(ValueError, match="stored by channel have no backward"):
        expert_mlp(x_TD.requires_grad_(), experts_TK, weights_TK, by_channel(experts, False))
