"""Cases of the Triton kernels for weights in 8 and 4 bits; they run like triton_cases.py."""

import functools
from dataclasses import replace

import pytest
import torch
from triton_cases import DEVICE, TOLERANCE, routing

from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.gpu import dequantize, quantized_ops, tiles
from moeyard.kernels.gpu.grouping import group_rows
from moeyard.kernels.values.activation import fc1_rows
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.quantize import quantize, quantize_experts
from moeyard.kernels.values.quantized_weights import QuantizedExpertWeights, QuantizedMatrices

FORMATS = [(8, None), (8, 32), (4, 32), (4, 64)]
# T, K, E, D, F: tiles of 16, 32 and 64 rows, with ragged ends; widths no tile divides.
SHAPES = {16: (9, 2, 5, 192, 64), 32: (25, 2, 5, 64, 192), 64: (70, 2, 3, 192, 64)}


@functools.lru_cache(maxsize=64)
def weights_of(experts, d_model, d_expert, bits, group_size, activation="swiglu"):
    g = torch.Generator().manual_seed(1)
    d_hidden = fc1_rows(d_expert, activation)
    fc1 = torch.randn(experts, d_hidden, d_model, generator=g) * d_model**-0.5
    fc2 = torch.randn(experts, d_model, d_expert, generator=g) * d_expert**-0.5
    experts = ExpertWeights(fc1, fc2, activation=activation)
    return quantize_experts(experts, bits, group_size)


def problem(shape, dtype, kind="with_none"):
    tokens, choices, experts, d_model, _ = shape
    g = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, d_model, generator=g).to(dtype)
    weights = torch.rand(tokens, choices, generator=g)
    return x, routing(kind, tokens, choices, experts), weights


def run(rows, experts, backend="triton"):
    return expert_mlp(*(part.to(DEVICE) for part in rows), experts.to(DEVICE), backend).cpu()


def expected_of(rows, experts):
    x, ids, weights = rows
    return expert_mlp(x.double(), ids, weights.double(), experts, "reference")


def assert_near(found, expected, dtype):
    assert found.dtype == dtype and found.shape == expected.shape
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error <= TOLERANCE[dtype], f"off by {float(error):.1e}"


# Types differ in rounding and in how values are widened; all use the same sizes.
CASES = [
    *((*made, torch.float32, 16 << i % 3) for i, made in enumerate(2 * FORMATS)),
    *((*made, torch.bfloat16, 16) for made in FORMATS),
    *((*made, torch.float16, 64) for made in FORMATS[1:3]),
]


@pytest.mark.parametrize(("bits", "group_size", "dtype", "rows"), CASES, ids=str)
def test_quantized_agrees_with_the_reference(bits, group_size, dtype, rows):
    shape = SHAPES[rows]
    inputs, experts = problem(shape, dtype), weights_of(*shape[2:], bits, group_size)
    assert_near(run(inputs, experts), expected_of(inputs, experts), dtype)


@pytest.mark.parametrize("activation", ["reglu", "geglu", "clamped_swiglu"])
def test_quantized_activations_agree_with_the_reference(activation):
    shape = SHAPES[16]
    whole = weights_of(*shape[2:], 4, 64)
    experts = QuantizedExpertWeights(whole.fc1, whole.fc2, activation=activation)
    inputs = problem(shape, torch.float32)
    assert_near(run(inputs, experts), expected_of(inputs, experts), torch.float32)


@pytest.mark.parametrize(
    ("activation", "bits", "rows_per_expert"),
    [("relu", 4, tiles.DEQUANTIZE_ROWS_PER_EXPERT), ("gelu", 8, 1)],
)
def test_quantized_experts_without_a_gate_agree(activation, bits, rows_per_expert, monkeypatch):
    """With widened tiles, and with matrices that are written out in x's type."""
    write_out_from(rows_per_expert, monkeypatch)
    shape = SHAPES[16]
    experts = biased(weights_of(*shape[2:], bits, 64, activation), torch.float32)
    inputs = problem(shape, torch.float32)
    assert_near(run(inputs, experts), expected_of(inputs, experts), torch.float32)


@pytest.mark.parametrize("kind", ["one_expert_takes_all", "nobody", "an_expert_is_idle"])
def test_quantized_takes_any_distribution_of_the_rows(kind):
    shape = (37, 2, 5, 64, 32)
    inputs, experts = problem(shape, torch.float32, kind), weights_of(*shape[2:], 4, 32)
    assert_near(run(inputs, experts), expected_of(inputs, experts), torch.float32)


def test_quantized_takes_no_tokens_and_ids_out_of_range():
    shape = (37, 2, 5, 64, 32)
    experts = weights_of(*shape[2:], 8, None)
    assert run(problem((0, *shape[1:]), torch.float32), experts).shape == (0, 64)
    x, ids, weights = problem(shape, torch.float32)
    wrong = ids.clone()
    wrong[::3, 0] = torch.tensor([5, -7, 2**31 - 1, 2**40, -(2**40)]).repeat(3)[:13]
    found = run((x, wrong, weights), experts)
    kept = torch.where(wrong == ids, ids, -1)
    assert_near(found, expected_of((x, kept, weights), experts), torch.float32)


def biased(experts, dtype):
    """Return the experts with biases about as large as the values they are added to."""
    g, (num_slots, height) = torch.Generator().manual_seed(3), experts.fc1.values.shape[:2]
    shapes = {"fc1_bias_SH": (num_slots, height), "fc2_bias_SD": (num_slots, experts.d_model)}
    made = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    return replace(experts, **made)


WAYS = pytest.mark.parametrize("way", ["widened", "written_out"])


def write_out_from(rows_per_expert, monkeypatch):
    """As few rows as the interpreter has time for."""
    monkeypatch.setattr(tiles, "DEQUANTIZE_ROWS_PER_EXPERT", rows_per_expert)


def test_quantized_weights_are_written_out_for_many_rows_where_there_is_room_whatever_the_slots():
    many = 128 * tiles.DEQUANTIZE_ROWS_PER_EXPERT
    assert [tiles.is_dequantized(many + more, 128, 1 << 20) for more in (-1, 0)] == [False, True]
    assert not tiles.is_dequantized(many, 128, 1 + tiles.DEQUANTIZED_BYTES // 128)


@WAYS
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 32)])
def test_quantized_gives_the_same_bits_from_any_slots(bits, group_size, way, monkeypatch):
    write_out_from(8 if way == "written_out" else 1000, monkeypatch)
    experts = biased(weights_of(3, 64, 32, bits, group_size), torch.float32)
    inputs = problem((25, 1, 3, 64, 32), torch.float16)

    def in_slots(order, table):
        def matrices(m):
            return QuantizedMatrices(m.values[order], m.scales_SQG[order])

        return QuantizedExpertWeights(
            matrices(experts.fc1),
            matrices(experts.fc2),
            slot_of_E=table,
            fc1_bias_SH=experts.fc1_bias_SH[order],
            fc2_bias_SD=experts.fc2_bias_SD[order],
        )

    resident = run(inputs, experts)
    # A pool with more slots than the layer has experts; the slots between belong to other layers.
    pool = in_slots([2, 2, 0, 1, 1, 0], (2, 4, 0))
    assert torch.equal(run(inputs, pool), resident)
    # A cache without expert 1; its rows count as rows without an expert.
    x, ids, weights = inputs
    cache = in_slots([2, 0], (1, -1, 0))
    there = (ids != 1) & (ids >= 0)
    assert torch.equal(run(inputs, cache), torch.where(there, resident, 0))
    expected = expected_of((x, torch.where(there, ids, -1), weights), experts)
    assert_near(run(inputs, cache), expected, torch.float16)


@WAYS
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 32)])
def test_quantized_reads_nothing_beside_its_inputs(bits, group_size, way, monkeypatch):
    """Other rows and slots are NaN, or bytes with a scale of NaN."""
    write_out_from(8 if way == "written_out" else 1000, monkeypatch)
    experts, tokens = weights_of(3, 64, 32, bits, group_size), 19
    x, ids, weights = problem((tokens, 1, 3, 64, 32), torch.float32)
    around = torch.full((tokens + 300, 64), torch.nan, device=DEVICE)
    around[100 : 100 + tokens] = x

    def surrounded(matrices):
        values, scales = matrices.values, matrices.scales_SQG
        all_values = values.new_full((5, *values.shape[1:]), 127)
        all_scales = scales.new_full((5, *scales.shape[1:]), torch.nan)
        all_values[1:4], all_scales[1:4] = values, scales
        return QuantizedMatrices(all_values.to(DEVICE)[1:4], all_scales.to(DEVICE)[1:4])

    inside = QuantizedExpertWeights(surrounded(experts.fc1), surrounded(experts.fc2))
    nan_weights = torch.where(ids >= 0, weights, torch.nan)
    rows = (around[100 : 100 + tokens], ids, nan_weights)
    assert_near(run(rows, inside), expected_of((x, ids, weights), experts), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 96), (4, 64), (4, 32)])
def test_quantized_weights_are_written_out_as_torch_does_it(bits, group_size, dtype):
    matrices = quantize(torch.randn(3, 40, 192), bits, group_size)
    groups = group_rows(torch.tensor([[0, 2]], device=DEVICE), None, 3, 16)
    table = torch.tensor([1, 0, 2], dtype=torch.int32, device=DEVICE)
    found = dequantize.dequantize(matrices.to(DEVICE), table, groups, dtype).cpu()
    for expert, slot in ((0, 1), (2, 2)):  # expert 1 has no rows
        assert torch.equal(found[expert], matrices.dequantize(slot, dtype))


def test_quantized_refuses_gradients_and_schemas_say_the_truth():
    shape = (37, 2, 5, 64, 32)
    experts = biased(weights_of(*shape[2:], 4, 32), torch.bfloat16).to(DEVICE)
    x, ids, weights = (part.to(DEVICE) for part in problem(shape, torch.float32))
    with pytest.raises(ValueError, match="quantized experts have no backward"):
        expert_mlp(x.requires_grad_(), ids, weights, experts, "triton")
    x = x.detach()
    fc1, fc2 = experts.fc1, experts.fc2
    parts = (fc1.values, fc1.scales_SQG, fc2.values, fc2.scales_SQG)
    parts += (experts.fc1_bias_SH, experts.fc2_bias_SD)
    table = torch.arange(5, dtype=torch.int32, device=DEVICE)
    arguments = (x, ids, weights, *parts, table, "swiglu")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(quantized_ops.quantized_expert_mlp_op, arguments, test_utils=checks)

    def twice(x, weights):
        return expert_mlp(x, ids, weights, experts, "triton") * 2

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weights), twice(x, weights))
