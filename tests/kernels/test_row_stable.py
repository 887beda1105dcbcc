"""A row's bits do not depend on the number of rows."""

import pytest
import torch

from moeyard.kernels.cpu import library
from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.linear import (
    linear,
    row_stable_linear,
)
from moeyard.kernels.values.expert_weights import ExpertWeights

NONE = library.Library(None, "left out")
WIDTHS = [(24, 6), (128, 257), (1024, 96), (1536, 1024), (2048, 1024), (4096, 512)]
COUNTS = [1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 16, 31, 64, 100]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", WIDTHS, ids=str)
@pytest.mark.parametrize("kernels", [library.load(), NONE], ids=["cpp", "torch"])
def test_few_rows_have_the_bits_of_many(width, threads, kernels, monkeypatch):
    monkeypatch.setattr(library, "_loaded", kernels)
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, width[0], generator=g)
    weight = torch.randn(width[1], width[0], generator=g) * width[0] ** -0.5
    with torch.no_grad():
        wide = row_stable_linear(x, weight)
        narrow = linear(x.bfloat16(), weight.bfloat16())
        for count in COUNTS:
            assert torch.equal(row_stable_linear(x[:count], weight), wide[:count])
            found = linear(x[:count].bfloat16(), weight.bfloat16())
            assert torch.equal(found, narrow[:count])
        for row in range(200):  # a single row's code path changes few elements of few rows
            found = linear(x[row : row + 1].bfloat16(), weight.bfloat16())
            assert torch.equal(found, narrow[row : row + 1])


def test_a_token_gets_the_same_experts_output_alone_and_among_others():
    """2048 is the width at which a single bf16 row takes another path in oneDNN."""
    g = torch.Generator().manual_seed(1)
    fc1 = (torch.randn(4, 2 * 64, 2048, generator=g) / 45).bfloat16()
    fc2 = (torch.randn(4, 2048, 64, generator=g) / 8).bfloat16()
    x = torch.randn(40, 2048, generator=g).bfloat16()
    ids = torch.randint(0, 4, (40, 2), generator=g).int()
    weights = torch.rand(40, 2, generator=g)
    with torch.no_grad():
        together = expert_mlp(x, ids, weights, ExpertWeights(fc1, fc2))
        for t in range(40):
            row = slice(t, t + 1)
            alone = expert_mlp(x[row], ids[row], weights[row], ExpertWeights(fc1, fc2))
            assert torch.equal(alone, together[row])
