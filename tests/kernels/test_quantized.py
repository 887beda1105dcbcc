"""Expert weights in 8 and 4 bits: rounding errors, and the same values in every backend."""

import pytest
import torch

from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.values.activation import fc1_rows
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.quantize import quantize, quantize_experts
from moeyard.kernels.values.quantized_weights import QuantizedExpertWeights, QuantizedMatrices

FORMATS = pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 32), (4, 32), (4, 64)])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dequantized(matrices, dtype=torch.float64):
    slots = range(matrices.values.shape[0])
    return torch.stack([matrices.dequantize(slot, dtype) for slot in slots])


@FORMATS
def test_no_weight_is_off_by_more_than_half_a_step(bits, group_size):
    weight = random(3, 10, 128)
    found = quantize(weight, bits, group_size)
    groups = weight.unflatten(-1, (-1, group_size or 128))
    # 4 bits may clip up to a quarter of the largest value if that helps the others.
    allowed = groups.abs().amax(-1, keepdim=True) * (1 / 254 if bits == 8 else 0.25) * 1.005
    error = (dequantized(found).unflatten(-1, (-1, group_size or 128)) - groups).abs()
    assert (error <= allowed).all()
    assert found.bits == bits and found.width == 128
    assert found.values.nbytes == weight.numel() * bits // 8


def test_four_bits_are_as_good_as_the_best_of_their_clips():
    weight = random(1, 64, 256)
    largest = weight.unflatten(-1, (-1, 64)).abs().amax(-1, keepdim=True)
    plain = (weight.unflatten(-1, (-1, 64)) / (largest / 7)).round() * (largest / 7)
    error_of_plain = (plain.flatten(-2) - weight).norm()
    assert (dequantized(quantize(weight, 4)) - weight).norm() < 0.97 * error_of_plain


def test_the_bytes_are_those_of_compressed_tensors():
    """Eight values of 4 bits in an int32, first input lowest, shifted by 8."""
    weight = torch.arange(-7, 9).clamp(max=7).repeat(2)[None, None, :32].float()
    found = quantize(weight, 4, 32)
    words = found.values.view(torch.int32).flatten().tolist()
    values = [(word >> 4 * place & 15) - 8 for word in words for place in range(8)]
    assert torch.equal(torch.tensor(values) * found.scales_SQG.item(), weight.flatten())


def test_rows_of_zeros_and_values_near_the_end_of_the_range_survive():
    weight = torch.zeros(1, 4, 64)
    weight[0, 1] = 1e-40
    weight[0, 2] = 3e38
    for bits in (8, 4):
        found = dequantized(quantize(weight, bits, 64), torch.float32)
        assert torch.isfinite(found).all() and not found[0, 0].any()
        torch.testing.assert_close(found[0, 2], weight[0, 2], rtol=0.02, atol=0)


def problem(tokens, choices, experts, d_model, d_expert, activation="swiglu"):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, experts, (tokens, choices), generator=g)
    weights = torch.rand(tokens, choices, generator=g)
    rows = fc1_rows(d_expert, activation)
    fc1 = random(experts, rows, d_model, seed=2) * d_model**-0.5
    fc2 = random(experts, d_model, d_expert, seed=3) * d_expert**-0.5
    found = ExpertWeights(fc1, fc2, activation=activation)
    return random(tokens, d_model), ids, weights, found


@FORMATS
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_experts_compute_with_the_rounded_weights(bits, group_size, backend, dtype, activation):
    x, ids, weights, experts = problem(19, 2, 5, 192, 64, activation)
    found = quantize_experts(experts, bits, group_size)
    matrices = (dequantized(found.fc1), dequantized(found.fc2))
    plain = ExpertWeights(*matrices, activation=activation)
    expected = expert_mlp(x.to(dtype).double(), ids, weights.double(), plain, "reference")
    y = expert_mlp(x.to(dtype), ids, weights, found, backend)
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert y.dtype == dtype and error <= (2e-4 if dtype == torch.float32 else 2e-2)


def test_a_slot_table_addresses_quantized_experts():
    x, ids, weights, experts = problem(19, 2, 3, 64, 32)
    table = (-1, 2, 0, -1, 1)
    found = quantize_experts(ExpertWeights(experts.fc1_SHD, experts.fc2_SDF, slot_of_E=table), 8)
    ids = torch.tensor([1, 2, 4, -1])[ids]  # only experts that are here
    expected = expert_mlp(x, ids, weights, found, "reference")
    torch.testing.assert_close(expert_mlp(x, ids, weights, found), expected, rtol=1e-3, atol=1e-3)


@FORMATS
def test_a_slot_is_written_through_its_views(bits, group_size):
    _, _, _, experts = problem(1, 1, 3, 192, 64)
    expected, found = (quantize_experts(experts, bits, group_size) for _ in range(2))
    for matrices in (found.fc1, found.fc2):
        matrices.values[1] = 0
        matrices.scales_SQG[1] = 0
    fc1, fc2 = expected.fc1.values[1], expected.fc2.values[1]
    rows = {"gate": fc1[:64], "up": fc1[64:], "down": fc2}
    fc1, fc2 = expected.fc1.scales_SQG[1], expected.fc2.scales_SQG[1]
    scales = {"gate": fc1[:64], "up": fc1[64:], "down": fc2}
    for part, view in found.slot_views(1).items():
        view.values.copy_(rows[part])
        view.scales_QG.copy_(scales[part])
        assert view.values.is_contiguous() and view.scales_QG.is_contiguous()
    for mine, theirs in ((found.fc1, expected.fc1), (found.fc2, expected.fc2)):
        assert torch.equal(mine.values, theirs.values)
        assert torch.equal(mine.scales_SQG, theirs.scales_SQG)


def test_says_what_is_wrong_before_anything_runs():
    weight = random(2, 8, 96)
    with pytest.raises(ValueError, match="group_size is 64; for matrices of 96 inputs"):
        quantize(weight, 4, 64)
    with pytest.raises(ValueError, match="group_size is 64"):
        quantize(weight, 4)
    with pytest.raises(ValueError, match="bits is 2; use 8 or 4"):
        quantize(weight, 2)
    good = quantize(weight, 8)
    with pytest.raises(ValueError, match=r"values have type torch\.int16"):
        QuantizedMatrices(good.values.short(), good.scales_SQG)
    with pytest.raises(ValueError, match=r"values \(2, 8, 96\) and scales \(2, 7, 1\)"):
        QuantizedMatrices(good.values, good.scales_SQG[:, :7])
    with pytest.raises(ValueError, match="5 scales for 96 inputs"):
        QuantizedMatrices(good.values, good.scales_SQG.expand(2, 8, 5))
    with pytest.raises(ValueError, match=r"fc1 \(2, 8, 96\) and fc2 \(2, 8, 96\) do not fit"):
        QuantizedExpertWeights(good, good)
    x, ids, weights, experts = problem(3, 2, 2, 64, 32)
    with pytest.raises(ValueError, match="quantized experts have no backward"):
        expert_mlp(x.requires_grad_(), ids, weights, quantize_experts(experts, 8))
