"""What routers of some layers would choose: C++ against torch."""

import numpy as np
import pytest
import torch

from moeyard.kernels import foretell as foretelling
from moeyard.kernels.foretell import Foreteller
from moeyard.kernels.values.next_routers import NextRouters

LAYERS, EXPERTS, WIDTH = 3, 10, 40


def problem(dtype, rows, is_sigmoid):
    generator = torch.Generator().manual_seed(rows)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    corrections = draw(LAYERS, EXPERTS) if is_sigmoid else None
    weights = (draw(LAYERS * EXPERTS, WIDTH).to(dtype), draw(LAYERS, EXPERTS), corrections)
    return draw(rows, WIDTH).to(dtype), weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 29])
@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_both_backends_name_the_best_experts_of_each_layer(dtype, rows, is_sigmoid, monkeypatch):
    x_TD, (weight_RD, bias_SE, corrections_SE) = problem(dtype, rows, is_sigmoid)
    foretell = Foreteller(NextRouters(weight_RD, bias_SE, corrections_SE, 2, 4, 13.0))
    with torch.inference_mode():
        found = foretell(x_TD)
        rows_by_cpp = [foretell.of_row(x_1D) for x_1D in x_TD.split(1)]
        monkeypatch.setattr(foretelling, "may_use_cpp", lambda _: False)
        others = foretell(x_TD)
        rows_by_torch = [foretell.of_row(x_1D) for x_1D in x_TD.split(1)]
    scores_TSE = (x_TD.double() @ weight_RD.double().T).reshape(rows, LAYERS, EXPERTS) + bias_SE
    if is_sigmoid:
        scores_TSE = scores_TSE.sigmoid() + corrections_SE
    best_TSW, expected_TSW = scores_TSE.topk(4, dim=2)
    spread_TS1 = best_TSW[:, :, :1] - scores_TSE.amin(dim=2, keepdim=True)
    chances_TSW = (13.0 * (best_TSW - best_TSW[:, :, 1:2]) / spread_TS1).sigmoid()
    for whole, rows in ((found, rows_by_cpp), (others, rows_by_torch)):
        experts_TSW, own_chances_TSW = map(torch.from_numpy, whole)
        same = experts_TSW.flatten().tolist() == [e for experts, _ in rows for e in experts]
        assert same or dtype == torch.bfloat16, "products of one row may round otherwise"
        assert torch.tensor([chances for _, chances in rows]).shape == (len(x_TD), LAYERS * 4)
        if dtype == torch.float32:
            assert torch.equal(experts_TSW.long(), expected_TSW)
            assert torch.allclose(own_chances_TSW.double(), chances_TSW, atol=1e-4)
        else:  # torch rounds the logits
            assert (experts_TSW == expected_TSW).float().mean() > 0.9
    assert np.allclose(found[1][:, :, 1], 0.5), "the last is as likely as not"
    assert all(np.allclose(chances[1::4], 0.5) for _, chances in rows_by_cpp)
