"""The loss of preference pairs."""

import math

import pytest
import torch

from moeyard.training.objectives.dpo import dpo_loss


def pairs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(4)]


def test_a_policy_that_is_its_reference_pays_ln_2():
    chosen, rejected, _, _ = pairs()
    terms = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1, label_smoothing=0.2)
    assert terms.loss_sum.item() == pytest.approx(5 * math.log(2))
    assert torch.equal(terms.margins_B, torch.zeros(5, dtype=torch.float64))


def test_other_sides_are_other_signs_and_smoothing_mixes_both_losses():
    chosen, rejected, was_chosen, was_rejected = pairs()
    right = dpo_loss(chosen, rejected, was_chosen, was_rejected, beta=0.3)
    wrong = dpo_loss(rejected, chosen, was_rejected, was_chosen, beta=0.3)
    assert torch.allclose(right.margins_B, -wrong.margins_B)
    mixed = dpo_loss(chosen, rejected, was_chosen, was_rejected, beta=0.3, label_smoothing=0.25)
    expected = 0.75 * right.loss_sum + 0.25 * wrong.loss_sum
    assert mixed.loss_sum.item() == pytest.approx(expected.item())


def test_values_and_gradients_are_those_of_the_formula():
    values = [one.requires_grad_() for one in pairs()]
    terms = dpo_loss(*values, beta=0.5)
    terms.loss_sum.backward()
    chosen, rejected, was_chosen, was_rejected = (one.detach() for one in values)
    margin = 0.5 * (chosen - was_chosen - rejected + was_rejected)
    assert terms.loss_sum.item() == pytest.approx(torch.log1p(torch.exp(-margin)).sum().item())
    slope = -0.5 * torch.sigmoid(-margin)
    for one, sign in zip(values, (1, -1, -1, 1), strict=True):
        assert torch.allclose(one.grad, sign * slope)
