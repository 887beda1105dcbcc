"""Soft MoE against its formula. B groups, T tokens, D width, E experts, P slots."""

import math

import pytest
import torch

from moeyard.errors import ConfigError
from moeyard.moe.soft_moe import SoftMoE

D, F, E, P = 6, 5, 3, 2


def build(num_experts=E, slots=P, **options):
    torch.manual_seed(0)
    layer = SoftMoE(D, F, num_experts, slots, backend="reference", **options).double()
    layer.scale.data.fill_(3.0)
    return layer


def rows(*shape, seed=1):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)).double()


def expert(layer, number, row):
    """One gated MLP on one row."""
    gate, up = (layer.experts.fc1[number] @ row).chunk(2)
    return layer.experts.fc2[number] @ (torch.nn.functional.silu(gate) * up)


@torch.no_grad()
def by_hand(layer, x_TD):
    """One group, token by token and slot by slot."""
    num_tokens, num_slots = len(x_TD), len(layer.mu_SD)

    def logit(token, slot):
        x, mu = x_TD[token], layer.mu_SD[slot]
        lengths = math.sqrt(float(x @ x) + 1e-6) * math.sqrt(float(mu @ mu) + 1e-6)
        return float(layer.scale) * float(x @ mu) / lengths

    powers = [[math.exp(logit(t, s)) for s in range(num_slots)] for t in range(num_tokens)]
    outputs = []
    for slot in range(num_slots):
        column = [row[slot] for row in powers]
        mixed = sum(p / sum(column) * x for p, x in zip(column, x_TD, strict=True))
        outputs.append(expert(layer, slot // layer.slots, mixed))
    return torch.stack(
        [sum(p / sum(row) * y for p, y in zip(row, outputs, strict=True)) for row in powers]
    )


@torch.no_grad()
def test_outputs_are_those_of_the_formula():
    layer, x_BTD = build(), rows(2, 7)
    expected = torch.stack([by_hand(layer, x_TD) for x_TD in x_BTD])
    torch.testing.assert_close(layer(x_BTD), expected)
    torch.testing.assert_close(layer(x_BTD[0]), expected[0])  # a group alone


@torch.no_grad()
def test_weights_add_up_to_one_over_tokens_and_over_slots():
    valid_BT = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    dispatch, combine = build().weights(rows(2, 7), valid_BT)
    torch.testing.assert_close(dispatch.sum(1), torch.ones(2, E * P).double())
    torch.testing.assert_close(combine.sum(2), valid_BT.double())
    assert not dispatch[~valid_BT].any()


@torch.no_grad()
def test_padding_changes_nothing_and_its_own_output_is_zero():
    layer, x_TD = build(), rows(5)
    padded = torch.cat([x_TD[:2], 99 * torch.ones(3, D).double(), x_TD[2:]])
    valid_T = torch.tensor([True] * 2 + [False] * 3 + [True] * 3)
    y_TD = layer(padded, valid=valid_T)
    torch.testing.assert_close(y_TD[valid_T], layer(x_TD))
    assert not y_TD[~valid_T].any()


def test_a_group_without_valid_tokens_gives_zeros_and_finite_gradients():
    layer, x_BTD = build(), rows(2, 4).requires_grad_()
    y_BTD = layer(x_BTD, valid=torch.tensor([[True] * 4, [False] * 4]))
    y_BTD.sum().backward()
    assert not y_BTD[1].any() and not x_BTD.grad[1].any() and x_BTD.grad.isfinite().all()
    assert layer(rows(2, 0)).shape == (2, 0, D)


@torch.no_grad()
def test_permuted_tokens_permute_the_output_and_later_tokens_change_earlier_ones():
    layer, x_TD = build(), rows(7)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    torch.testing.assert_close(layer(x_TD[order]), layer(x_TD)[order])
    other = x_TD.clone()
    other[6] += 1
    assert not torch.allclose(layer(other)[0], layer(x_TD)[0])  # it is not causal


@torch.no_grad()
def test_one_slot_and_no_scale_compute_the_mean_token():
    layer, x_TD = build(num_experts=1, slots=1), rows(7)
    layer.scale.data.zero_()
    torch.testing.assert_close(layer(x_TD), expert(layer, 0, x_TD.mean(0)).expand(7, D))


def test_gradients_are_those_of_finite_differences():
    layer, x_BTD = build(), rows(2, 3).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def value(x_BTD, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, named, (x_BTD,))

    parameters = [parameter.detach().requires_grad_() for parameter in layer.parameters()]
    assert torch.autograd.gradcheck(value, (x_BTD, *parameters))


@torch.no_grad()
def test_bf16_follows_fp64_also_under_autocast():
    layer, x_BTD = build(), rows(2, 7)
    expected = layer(x_BTD)
    half = SoftMoE(D, F, E, P)
    half.load_state_dict(layer.state_dict())
    half.experts.to(torch.bfloat16)
    y_BTD = half(x_BTD.bfloat16())
    assert y_BTD.dtype == torch.bfloat16
    torch.testing.assert_close(y_BTD.double(), expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half(x_BTD.bfloat16()), y_BTD)


def test_sizes_and_shapes_that_do_not_fit_have_a_sentence():
    with pytest.raises(ConfigError, match="slots is 0; use a whole number from 1"):
        SoftMoE(D, F, E, 0)
    with pytest.raises(ConfigError, match=r"x has shape \[4, 5\], but d_model is 6"):
        build()(torch.zeros(4, 5))
    with pytest.raises(ConfigError, match=r"valid has shape \[3\] and x \[4, 6\]"):
        build()(torch.zeros(4, 6), valid=torch.ones(3).bool())
