"""Experts with an adapter's updates: a dense sum, whatever the waves and the other rows."""

import pytest
import torch

from moeyard.kernels.adapted_waves import AdaptedWaves
from moeyard.kernels.values.activation import ACTIVATIONS, fc1_rows, gated
from moeyard.kernels.values.expert_update import ExpertUpdate
from moeyard.kernels.values.expert_weights import ExpertWeights

TOKENS, EXPERTS, D_MODEL, D_EXPERT, RANK = 37, 5, 24, 26, 4


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5


def case(activation, dtype):
    d_hidden = fc1_rows(D_EXPERT, activation)
    fc1, fc2 = draw(EXPERTS, d_hidden, D_MODEL), draw(EXPERTS, D_MODEL, D_EXPERT, seed=1)
    fc1_update = draw(EXPERTS, RANK, D_MODEL, seed=2), draw(EXPERTS, d_hidden, RANK, seed=3)
    fc2_update = draw(EXPERTS, RANK, D_EXPERT, seed=4), draw(EXPERTS, D_MODEL, RANK, seed=5)
    update = ExpertUpdate(*(tuple(t.to(dtype) for t in u) for u in (fc1_update, fc2_update)))
    weights = ExpertWeights(fc1.to(dtype), fc2.to(dtype), activation=activation)
    experts = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(6)).topk(2)[1]
    experts[3, 1] = -1
    rows = (3 * draw(TOKENS, D_MODEL, seed=7)).to(dtype), experts.int(), draw(TOKENS, 2, seed=8)
    return rows, weights, update


def run(rows, weights, update, waves=(None,)):
    with torch.inference_mode():
        sums = AdaptedWaves(*rows, EXPERTS, update)
        for only in waves:
            sums.add(weights, only)
        return sums.result()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_expert_with_b_a_added(activation):
    (x, experts, choice), weights, update = case(activation, torch.float32)
    fc1 = weights.fc1_SHD + update.fc1_EPD[1] @ update.fc1_EPD[0]
    fc2 = weights.fc2_SDF + update.fc2_EPF[1] @ update.fc2_EPF[0]
    expected = torch.zeros_like(x)
    for token in range(TOKENS):
        for k in range(2):
            if (expert := experts[token, k]) >= 0:
                act = gated((fc1[expert] @ x[token]).unsqueeze(0), activation)[0]
                expected[token] += choice[token, k] * (fc2[expert] @ act)
    found = run((x, experts, choice), weights, update)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - run((x, experts, choice), weights, ExpertUpdate())).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_rows_bits_depend_neither_on_waves_nor_on_other_rows(activation, dtype):
    rows, weights, update = case(activation, dtype)
    together = run(rows, weights, update)
    assert run(rows, weights, update, ([4, 1], [0], [2, 3])).equal(together)
    for token in range(TOKENS):
        alone = tuple(part[token : token + 1] for part in rows)
        assert run(alone, weights, update).equal(together[token : token + 1])
