"""Group-sparse experts in 4 bits: what is pruned, what is kept, and the same values everywhere."""

import functools

import pytest
import torch

from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.group_sparse import (
    GroupSparseExpertWeights,
    GroupSparseMatrices,
    check_columns,
    widened,
)
from moeyard.kernels.values.quantize import quantize
from moeyard.kernels.values.sparsify import kept_groups, sparsify, sparsify_all, sparsify_experts
from moeyard.kernels.waves import start_waves

BACKENDS = pytest.mark.parametrize("backend", ["torch", "auto"])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dequantized(matrices, dtype=torch.float64):
    slots = range(matrices.values.shape[0])
    return torch.stack([matrices.dequantize(slot, dtype) for slot in slots])


def test_kept_groups_are_plain_int4_and_the_best_and_all_others_are_zero():
    weight, importance = random(24, 256), random(256, seed=1).square()
    found = widened(sparsify(weight, importance, kept=3), torch.float32).unflatten(-1, (-1, 32))
    worth = (weight.square() * importance).unflatten(-1, (-1, 32)).sum(dim=-1)
    is_kept = torch.zeros_like(worth, dtype=torch.bool)
    is_kept.scatter_(1, worth.topk(3, dim=1).indices, True)
    assert (found.abs().sum(dim=-1) > 0).equal(is_kept)
    alone = sparsify(weight, torch.ones(256), kept=3)
    same = (alone.columns_QN == sparsify(weight, None, 3).columns_QN).all()
    assert same and not torch.equal(alone.columns_QN, sparsify(weight, importance, 3).columns_QN)


def test_pruned_by_magnitude_the_kept_groups_have_the_bits_of_plain_int4():
    weight = random(2, 24, 256)
    plain = dequantized(quantize(weight, 4, 32)).unflatten(-1, (-1, 32))
    found = dequantized(sparsify_all(weight, 0.5)).unflatten(-1, (-1, 32))
    is_kept = found.abs().sum(dim=-1, keepdim=True) > 0
    assert (is_kept.sum(dim=2) == 4).all()
    assert torch.equal(found, plain * is_kept)


def test_without_pruning_it_is_plain_int4_of_the_same_groups():
    weight = random(3, 8, 160)
    sparse, plain = sparsify_all(weight, 0.0), quantize(weight, 4, 32)
    assert torch.equal(sparse.values, plain.values)
    assert torch.equal(sparse.scales_SQN, plain.scales_SQG)
    assert torch.equal(dequantized(sparse), dequantized(plain))


def test_scales_go_by_what_the_inputs_weigh():
    weight, importance = random(64, 128), random(128, seed=1).square() ** 3

    def error(importance_P):
        found = widened(sparsify(weight, importance_P, kept=4), torch.float32)
        return float(((found - weight).square() * importance).sum())

    assert error(importance) < 0.97 * error(None)


def test_rows_of_zeros_and_equal_groups_survive():
    weight = torch.zeros(3, 128)
    weight[1] = 0.4375
    view = sparsify(weight, None, kept=2)
    assert view.columns_QN.tolist() == [[0, 1]] * 3
    found = widened(view, torch.float32)
    assert not found[0].any() and found[1, :64].eq(0.4375).all() and not found[1, 64:].any()


def test_at_least_one_group_stays_and_the_bytes_are_few():
    assert [kept_groups(128, s) for s in (0, 0.25, 0.5, 0.9)] == [4, 3, 2, 1]
    experts = ExpertWeights(random(2, 128, 256), random(2, 256, 64))
    few = sparsify_experts(experts, 0.5)
    groups = 2 * (128 * 4 + 256 * 1)
    assert few.nbytes == groups * (16 + 1 + 2)


def test_wide_rows_have_columns_of_two_bytes():
    found = sparsify_all(random(1, 4, 8224), 0.5)
    assert found.columns_SQN.dtype == torch.int16 and found.kept == 128
    check_columns(found.columns_SQN[0], 8224)
    assert int(found.columns_SQN.max()) > 200


@pytest.mark.parametrize("columns", [[[0, 0]], [[1, 0]], [[2, 4]], [[0, 255]]])
def test_columns_that_name_no_group_are_refused(columns):
    with pytest.raises(ValueError, match="columns do not ascend from 0 to 3"):
        check_columns(torch.tensor(columns, dtype=torch.uint8), 128)
    with pytest.raises(ValueError, match="columns"):
        check_columns(torch.tensor([[-1, 2]], dtype=torch.int16), 8192)


def test_parts_that_do_not_belong_together_are_refused():
    good = sparsify_all(random(2, 8, 128), 0.5)
    values, columns, scales = good.tensors
    with pytest.raises(ValueError, match="have types"):
        GroupSparseMatrices(values, columns.short(), scales, 128)
    with pytest.raises(ValueError, match="do not fit"):
        GroupSparseMatrices(values[:, :, :-1], columns, scales, 128)
    with pytest.raises(ValueError, match="keep 2 groups of 32 of 32 inputs"):
        GroupSparseMatrices(values, columns, scales, 32)


@functools.cache
def sparse_experts(d_model=192, d_expert=96, bias=False, sparsity=0.5, experts=5):
    fc1 = random(experts, 2 * d_expert, d_model, seed=2) * d_model**-0.5
    fc2 = random(experts, d_model, d_expert, seed=3) * d_expert**-0.5
    shapes = ((experts, 2 * d_expert), (experts, d_model))
    biases = [random(*shape, seed=4) if bias else None for shape in shapes]
    return sparsify_experts(ExpertWeights.of((fc1, fc2, *biases)), sparsity)


def rows_for(found, tokens):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, found.num_experts, (tokens, 2), generator=g)
    return random(tokens, found.d_model), ids, torch.rand(tokens, 2, generator=g)


@BACKENDS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_compute_with_the_weights_they_stand_for(dtype, bias, backend):
    found = sparse_experts(bias=bias, sparsity=0.4)
    plain = ExpertWeights.of(
        (dequantized(found.fc1), dequantized(found.fc2), *(b.double() for b in found.bias_parts))
    )
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    for tokens in (1, 2, 3, 4, 5, 7, 8, 19, 130):
        x, ids, weights = rows_for(found, tokens)
        x = x.to(dtype)
        expected = expert_mlp(x.double(), ids, weights.double(), plain, "reference")
        y = expert_mlp(x, ids, weights, found, backend)
        assert (y.double() - expected).abs().max() <= limit * expected.abs().max(), tokens


def test_wide_columns_compute_the_same():
    found = sparse_experts(d_model=8224, d_expert=32, sparsity=0.9, experts=2)
    x, ids, weights = rows_for(found, 5)
    assert found.fc1.columns_SQN.dtype == torch.int16
    y = expert_mlp(x, ids, weights, found, "auto")
    expected = expert_mlp(x, ids, weights, found, "reference")
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@BACKENDS
def test_a_row_has_the_same_bits_whatever_else_is_in_the_batch(backend):
    found = sparse_experts()
    x, ids, weights = rows_for(found, 130)
    x = x.bfloat16()
    ids[:] = torch.tensor([2, 4])
    together = expert_mlp(x, ids, weights, found, backend)
    for rows in (1, 2, 3, 4, 5, 6, 17, 97):
        part = expert_mlp(x[-rows:], ids[-rows:], weights[-rows:], found, backend)
        assert torch.equal(part, together[-rows:]), rows


@BACKENDS
def test_slots_do_not_change_the_bits(backend):
    found = sparse_experts()
    x, ids, weights = rows_for(found, 9)
    x = x.bfloat16()
    ids = ids.clamp(min=2)
    expected = expert_mlp(x, ids, weights, found, backend)
    parts = [
        GroupSparseMatrices(*(t[[4, 2, 3]].clone() for t in m.tensors), m.width)
        for m in (found.fc1, found.fc2)
    ]
    moved = GroupSparseExpertWeights(*parts, slot_of_E=(-1, -1, 1, 2, 0))
    assert torch.equal(expert_mlp(x, ids, weights, moved, backend), expected)
    with torch.no_grad():
        waves = start_waves(x, ids, weights, 5)
        for only in ([3], [4, 2]):
            waves.add(moved, only)
        if backend == "auto":
            assert torch.equal(waves.result(), expected)


def test_rows_that_are_not_finite_stay_so():
    found = sparse_experts()
    x, ids, weights = rows_for(found, 3)
    ids[:] = 1
    x[1, 7] = torch.inf
    y = expert_mlp(x, ids, weights, found)
    assert not torch.isfinite(y[1]).any() and torch.isfinite(y[[0, 2]]).all()


def test_gradients_and_backends_without_a_kernel_are_refused():
    found = sparse_experts()
    x, ids, weights = rows_for(found, 3)
    with pytest.raises(ValueError, match="no backward"):
        expert_mlp(x.requires_grad_(), ids, weights, found)
    with pytest.raises(ValueError, match="backend is 'triton'"):
        expert_mlp(x.detach(), ids, weights, found, "triton")
