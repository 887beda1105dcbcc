"""Low-rank products by expert are those of a loop over rows, with all gradients."""

import pytest
import torch

from moeyard.kernels.routed_low_rank import group_rows, routed_low_rank, served_low_rank

SCALE = 1.75


def case(dtype, rank, num_rows=37, num_experts=5, inputs=24, outputs=40):
    """Rows without an expert, and experts without rows."""
    generator = torch.Generator().manual_seed(rank)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, a = draw(num_rows, inputs), draw(num_experts, rank, inputs) * inputs**-0.5
    b = draw(num_experts, outputs, rank)
    weights = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    weights = weights.to(torch.promote_types(dtype, torch.float32))
    experts = torch.randint(-1, num_experts - 1, (num_rows,), generator=generator)
    return [x, a, b, weights], experts.int()


def by_row(x, a, b, weights, experts):
    """The same, row by row."""
    rows = []
    for row, expert in enumerate(experts.tolist()):
        if expert < 0:
            rows.append(x[row] @ a[0].T @ b[0].T * 0)
        else:
            factor = SCALE if weights is None else weights[row] * SCALE
            rows.append((x[row] @ a[expert].T @ b[expert].T) * factor)
    return torch.stack(rows).to(x.dtype)


@pytest.mark.parametrize("is_weighted", [True, False])
@pytest.mark.parametrize("rank", [1, 4, 7, 32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_all_gradients_are_those_of_a_loop(dtype, rank, is_weighted):
    tensors, experts = case(dtype, rank)
    upstream = torch.randn(37, 40, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run(function, wide):
        leaves = [tensor.clone().to(wide(tensor)).requires_grad_() for tensor in tensors]
        y = function(*leaves[:3], leaves[3] if is_weighted else None)
        y.backward(upstream.to(y.dtype))
        return [y, *(leaf.grad for leaf in leaves[: 4 if is_weighted else 3])]

    groups = group_rows(experts, 5)
    found = run(
        lambda x, a, b, w: routed_low_rank(x, a, b, groups, SCALE, w), lambda tensor: tensor.dtype
    )
    expected = run(lambda x, a, b, w: by_row(x, a, b, w, experts), lambda _tensor: torch.float64)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for ours, right in zip(found, expected, strict=True):
        assert ours.dtype in (dtype, tensors[3].dtype)
        assert (ours - right).abs().max() <= tolerance * right.abs().max()
    _, _, grad_a, grad_b = found[:4]
    assert not grad_a[4].any() and not grad_b[4].any()  # no row chose the last expert
    assert not found[0][experts < 0].any() and not found[1][experts < 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_served_rows_have_the_same_bits_in_any_batch(dtype):
    (x, a, b, _), experts = case(dtype, rank=6)
    with torch.inference_mode():
        whole = served_low_rank(x, a, b, group_rows(experts, 5))
        right = by_row(x.double(), a.double(), b.double(), None, experts) / SCALE
        assert (whole - right).abs().max() <= 2e-2 * right.abs().max()
        for rows in (torch.arange(1), torch.arange(3, 8), torch.arange(36, -1, -1)):
            part = served_low_rank(x[rows], a, b, group_rows(experts[rows], 5))
            assert part.equal(whole[rows])


def test_no_rows_and_unknown_experts():
    (x, a, b, _), _ = case(torch.float32, rank=4)
    none = torch.full((3,), -1)
    assert served_low_rank(x[:3], a, b, group_rows(none, 5)).eq(0).all()
    assert routed_low_rank(x[:0], a, b, group_rows(none[:0], 5), 1.0).shape == (0, 40)
    with pytest.raises(ValueError, match="expert id 5 is outside"):
        group_rows(torch.tensor([1, 5]), 5)
