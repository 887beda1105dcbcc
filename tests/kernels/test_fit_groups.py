"""Groups that are left make up for those that are pruned, and values for the rounding of others."""

import pytest
import torch

from moeyard.kernels.values.fit_groups import best_groups, best_values, fit_groups, refitted
from moeyard.kernels.values.group_sparse import check_columns, widened
from moeyard.kernels.values.sparsify import sparsify

ROWS, WIDTH, KEPT = 48, 256, 4


@pytest.fixture(scope="module")
def weight():
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def hessian():
    """Of inputs that depend on each other and are of different sizes."""
    g = torch.Generator().manual_seed(1)
    few = torch.randn(2000, 100, generator=g) @ torch.randn(100, WIDTH, generator=g)
    x = (few + torch.randn(2000, WIDTH, generator=g)) * torch.rand(WIDTH, generator=g)
    h = x.T @ x
    return h + 0.01 * h.diagonal().mean() * torch.eye(WIDTH)


def error(found, ideal, hessian):
    off = (found - ideal).double()
    return float((off @ hessian.double() * off).sum())


def of_view(view, ideal, hessian):
    return error(widened(view, torch.float32), ideal, hessian)


def test_what_is_left_is_the_least_squares_fit(weight, hessian):
    is_kept = best_groups(weight, hessian, KEPT)
    found = refitted(weight, hessian, is_kept)
    for row in range(0, ROWS, 7):
        kept = is_kept[row].repeat_interleave(32)
        h = hessian.double()
        expected = torch.linalg.solve(h[kept][:, kept], h[kept] @ weight[row].double())
        off = torch.zeros(WIDTH, dtype=torch.float64)
        off[kept] = expected
        best = error(off, weight[row], hessian)
        assert not found[row, ~kept].any()
        assert error(found[row], weight[row], hessian) == pytest.approx(best, rel=0.02)


def test_groups_are_chosen_by_what_the_others_cannot_make_up_for(weight, hessian):
    is_kept = best_groups(weight, hessian, KEPT)
    assert (is_kept.sum(dim=1) == KEPT).all()
    diagonal = torch.zeros_like(is_kept)
    columns = sparsify(weight, hessian.diagonal(), KEPT).columns_QN.long()
    diagonal.scatter_(1, columns, True)
    best, plain = (refitted(weight, hessian, mask) for mask in (is_kept, diagonal))
    assert error(best, weight, hessian) < 0.9 * error(plain, weight, hessian)


def test_values_make_up_for_the_rounding_of_others(weight, hessian):
    scales = weight.unflatten(-1, (-1, 32)).abs().amax(dim=-1) / 7
    scales[:, 3] = 0
    wide = scales.repeat_interleave(32, dim=1)
    nearest = torch.where(wide > 0, (weight / wide).round(), 0)
    found = best_values(weight, scales, weight, hessian)
    assert found.abs().max() <= 7 and not found[:, 96:128].any()
    others = torch.ones(WIDTH, dtype=torch.bool)
    others[96:128] = False
    assert error(found * wide, weight, hessian) < 0.7 * error(nearest * wide, weight, hessian)


@pytest.mark.parametrize("kept", [1, 4, 8])
def test_the_error_is_smaller_than_that_of_pruning_alone(weight, hessian, kept):
    plain, found = sparsify(weight, hessian.diagonal(), kept), fit_groups(weight, hessian, kept)
    assert [(p.dtype, p.shape) for p in found] == [(p.dtype, p.shape) for p in plain]
    check_columns(found.columns_QN, WIDTH)
    assert of_view(found, weight, hessian) < 0.8 * of_view(plain, weight, hessian)
    again = fit_groups(weight, hessian, kept)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_rows_of_zeros_stay_zeros(weight, hessian):
    some = weight.clone()
    some[5] = 0
    found = widened(fit_groups(some, hessian, KEPT), torch.float32)
    assert torch.isfinite(found).all() and not found[5].any() and found[4].any()
