"""Lines of routed rows that another sum has computed: the bits of one that computes them all."""

import pytest
import torch

from moeyard.kernels.cpu import library
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.waves import start_waves

T, K, E, D, F = 9, 3, 7, 24, 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_cpp", [True, False], ids=["cpp", "torch"])
def test_a_sum_of_lines_from_elsewhere_has_the_bits_of_a_whole_one(
    dtype, has_cpp, monkeypatch, no_gradients
):
    if not has_cpp:
        monkeypatch.setattr(library, "_loaded", library.Library(None, "no C++ compiler"))
    generator = torch.Generator().manual_seed(2)
    fc1 = torch.randn(E, 2 * F, D, generator=generator).to(dtype)
    fc2 = torch.randn(E, D, F, generator=generator).to(dtype)
    weights = ExpertWeights.of((fc1, fc2, None, None))
    x_TD = torch.randn(T, D, generator=generator).to(dtype)
    experts_TK = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)]).int()
    experts_TK[4, 1] = -1
    weights_TK = torch.rand(T, K, generator=generator)
    whole = start_waves(x_TD, experts_TK, weights_TK, E)
    whole.add(weights)
    split = start_waves(x_TD, experts_TK, weights_TK, E)
    for experts in ([0, 4, 5], [1, 6], [2, 3]):
        is_theirs_TK = torch.isin(experts_TK, torch.tensor(experts))
        rows_N = is_theirs_TK.any(dim=1).nonzero().flatten()
        ids_NK = experts_TK.masked_fill(~is_theirs_TK, -1)[rows_N]
        elsewhere = start_waves(x_TD[rows_N], ids_NK, torch.zeros(len(rows_N), K), E)
        elsewhere.add(weights, only=[e for e in experts if (ids_NK == e).any()])
        lines_rD = elsewhere.lines((ids_NK.flatten() >= 0).nonzero().flatten())
        assert lines_rD.dtype == (torch.float32 if has_cpp else dtype)
        split.fill(is_theirs_TK.flatten().nonzero().flatten(), lines_rD)
    assert torch.equal(split.result(), whole.result())
    assert whole.result().isfinite().all() and bool(whole.result().any())
