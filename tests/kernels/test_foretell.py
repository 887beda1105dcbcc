"""What routers of some layers would choose: C++ against torch."""

import pytest
import torch

from moeyard.kernels import foretell as foretelling
from moeyard.kernels.foretell import Foreteller

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
    foretell = Foreteller(weight_RD, bias_SE, corrections_SE, 2, 4, 13.0)
    with torch.inference_mode():
        found = foretell(x_TD)
        monkeypatch.setattr(foretelling, "may_use_cpp", lambda _: False)
        others = foretell(x_TD)
    scores_TSE = (x_TD.double() @ weight_RD.double().T).reshape(rows, LAYERS, EXPERTS) + bias_SE
    if is_sigmoid:
        scores_TSE = scores_TSE.sigmoid() + corrections_SE
    best_TSW, expected_TSW = scores_TSE.topk(4, dim=2)
    spread_TS1 = best_TSW[:, :, :1] - scores_TSE.amin(dim=2, keepdim=True)
    chances_TSW = (13.0 * (best_TSW - best_TSW[:, :, 1:2]) / spread_TS1).sigmoid()
    for experts_TSW, own_chances_TSW in (found, others):
        if dtype == torch.float32:
            assert torch.equal(experts_TSW.long(), expected_TSW)
            assert torch.allclose(own_chances_TSW.double(), chances_TSW, atol=1e-4)
        else:  # torch rounds the logits
            assert (experts_TSW == expected_TSW).float().mean() > 0.9
    assert torch.allclose(found[1][:, :, 1], torch.tensor(0.5)), "the last is as likely as not"
