"""The torch backend against the reference: values and all gradients."""

import pytest
import torch
import torch.nn.functional as F

from moeyard.kernels.cpu import library
from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.torch_ops.experts import combine_rows
from moeyard.kernels.values.activation import ACTIVATIONS, UNGATED, fc1_rows, gated
from moeyard.kernels.values.expert_weights import ExpertWeights, empty_slots
from moeyard.kernels.values.grouping import group_tokens
from moeyard.kernels.values.main_grads import MainGrads
from moeyard.kernels.waves import start_waves

NONE = library.Library(None, "left out")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}

ROUTINGS = {
    "random": lambda g, t, k, e: torch.randint(0, e, (t, k), generator=g),
    "with_none": lambda g, t, k, e: torch.randint(-1, e, (t, k), generator=g),
    "one_expert_takes_all": lambda g, t, k, e: torch.full((t, k), e - 1),
    "nobody": lambda g, t, k, e: torch.full((t, k), -1),
}
SHAPES = [
    (0, 2, 3, 8, 8),
    (1, 1, 1, 6, 5),
    (37, 2, 5, 24, 40),
    (300, 3, 4, 16, 8),
    (9, 4, 4, 123, 7),
]


BIASES = pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "biased"])


def problem(shape, routing, dtype, seed=0, has_bias=False, activation="swiglu"):
    tokens, choices, experts, d_model, d_expert = shape
    d_hidden = fc1_rows(d_expert, activation)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d_model, generator=g, dtype=torch.float64)
    weights = torch.rand(tokens, choices, generator=g, dtype=torch.float64)
    fc1 = torch.randn(experts, d_hidden, d_model, generator=g, dtype=torch.float64)
    fc2 = torch.randn(experts, d_model, d_expert, generator=g, dtype=torch.float64)
    ids = ROUTINGS[routing](g, tokens, choices, experts).int()
    # The routing weights stay wide, as routers make them.
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.to(dtype), weights.to(wide), (fc1 * d_model**-0.5).to(dtype)]
    leaves.append((fc2 * d_expert**-0.5).to(dtype))
    if has_bias:
        widths = (d_hidden, d_model)
        leaves += (torch.randn(experts, width, generator=g).to(dtype) for width in widths)
    return ids, [leaf.requires_grad_() for leaf in leaves]


def run(ids, leaves, backend, activation="swiglu"):
    x, weights, fc1, fc2, *biases = leaves
    experts = ExpertWeights.of((fc1, fc2, *biases), activation=activation)
    y = expert_mlp(x, ids, weights, experts, backend)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, leaves, upstream)


NAMES = ("y", "x", "weights", "fc1", "fc2", "bias1", "bias2")


@BIASES
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference_in_values_and_all_gradients(shape, routing, dtype, has_bias):
    ids, leaves = problem(shape, routing, dtype, has_bias=has_bias)
    y, grads = run(ids, leaves, "torch")
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected_y, expected_grads = run(ids, exact, "reference")
    pairs = zip((y, *grads), (expected_y, *expected_grads), strict=True)
    for name, (actual, expected) in zip(NAMES, pairs, strict=False):
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        error = (actual.double() - expected).abs().max() / scale if expected.numel() else 0.0
        assert error <= TOLERANCE[dtype], f"{name} is off by {float(error)}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_agree_with_torch_and_with_the_reference_in_all_gradients(activation):
    h = 8 * torch.randn(70, 10, dtype=torch.float64)
    gate, up = h[:, :5], h[:, 5:]
    if activation in UNGATED:
        expected = {"relu": F.relu, "gelu": F.gelu}[activation](h)
    elif activation == "clamped_swiglu":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        expected = gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    else:
        expected = {"swiglu": F.silu, "reglu": F.relu, "geglu": F.gelu}[activation](gate) * up
    torch.testing.assert_close(gated(h, activation), expected)
    shape = (37, 2, 5, 24, 40)
    ids, leaves = problem(shape, "with_none", torch.float64, has_bias=True, activation=activation)
    leaves[2] = (leaves[2].detach() * 10).requires_grad_()  # some gates are clamped
    y, grads = run(ids, leaves, "torch", activation)
    expected_y, expected = run(ids, leaves, "reference", activation)
    for actual, wanted in zip((y, *grads), (expected_y, *expected), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("first", [0, 2, 4])
def test_a_share_of_the_experts_agrees_with_the_reference(first):
    """As on a rank: a slot table and few rows, all of them for experts that are here."""
    ids, leaves = problem((11, 2, 2, 16, 8), "with_none", torch.float32)
    ids = torch.where(ids >= 0, ids + first, -1)
    table = tuple(e - first if first <= e < first + 2 else -1 for e in range(6))
    x, weights, fc1, fc2 = leaves
    found = []
    for backend in ("torch", "reference"):
        y = expert_mlp(x, ids, weights, ExpertWeights(fc1, fc2, slot_of_E=table), backend)
        found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@BIASES
@pytest.mark.parametrize("is_empty", [False, True], ids=["filled", "empty"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_backward_adds_gradients_to_main_gradients_where_there_are_any(dtype, is_empty, has_bias):
    ids, leaves = problem((37, 2, 5, 24, 40), "with_none", dtype, has_bias=has_bias)
    ids = torch.where(ids == 3, -1, ids)  # an expert without rows
    x, weights, fc1, fc2, *biases = leaves
    _, returned = run(ids, leaves, "torch")
    wide = torch.promote_types(dtype, torch.float32)
    fill = float("nan") if is_empty else 1.0  # the contents of an empty sum must not matter
    totals = [torch.full(leaf.shape, fill, dtype=wide) for leaf in leaves[2:]]
    sums = MainGrads.of(totals, is_empty=is_empty)
    experts = ExpertWeights.of((fc1, fc2, *biases), main_grads=sums)
    for _ in range(2):
        y = expert_mlp(x, ids, weights, experts, "torch")
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
        y.backward(upstream)
    assert all(leaf.grad is None for leaf in leaves[2:])
    for total, one in zip(totals, returned[2:], strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-2
        expected = 2 * one.to(wide) + (0 if is_empty else 1)
        torch.testing.assert_close(total, expected, rtol=tolerance, atol=tolerance)


def test_reference_gradients_pass_gradcheck():
    ids, leaves = problem((5, 2, 3, 4, 3), "with_none", torch.float64, has_bias=True)

    def f(x, weights, fc1, fc2, *biases):
        experts = ExpertWeights.of((fc1, fc2, *biases))
        return expert_mlp(x, ids, weights, experts, "reference")

    assert torch.autograd.gradcheck(f, leaves)


def test_an_experts_bias_is_weighted_as_its_output_is():
    fc1, fc2 = torch.zeros(2, 4, 3), torch.zeros(2, 3, 2)
    bias1, bias2 = torch.zeros(2, 4), torch.tensor([[1.0, 2, 3], [10, 20, 30]])
    experts = ExpertWeights(fc1, fc2, fc1_bias_SH=bias1, fc2_bias_SD=bias2)
    ids, weights = torch.tensor([[1, 0], [0, -1]]), torch.tensor([[0.5, 2.0], [3.0, 7.0]])
    y = expert_mlp(torch.ones(2, 3), ids, weights, experts, "reference")
    assert torch.equal(y, torch.tensor([[7.0, 14, 21], [3, 6, 9]]))


@BIASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [3, 700], ids=["few_rows", "many_rows"])
@pytest.mark.parametrize("kernels", [library.load(), NONE], ids=["cpp", "torch"])
def test_waves_through_few_slots_give_the_resident_bits(
    dtype, tokens, kernels, has_bias, monkeypatch
):
    shape = (tokens, 2, 6, 32, 48)
    ids, leaves = problem(shape, "random", dtype, has_bias=has_bias)
    x, weights, *parameters = (leaf.detach() for leaf in leaves)
    monkeypatch.setattr(library, "_loaded", kernels)
    fc1, fc2, *biases = parameters
    all_experts = ExpertWeights.of((fc1, fc2, *biases))
    with torch.no_grad():
        resident = expert_mlp(x, ids, weights, all_experts)
        waves = start_waves(x, ids, weights, 6)
    slot1, slot2 = empty_slots(1, 96, 32, dtype), empty_slots(1, 32, 48, dtype)
    slots_of_biases = [torch.empty_like(bias[:1]) for bias in biases]
    for expert in reversed(range(6)):
        table = tuple(0 if e == expert else -1 for e in range(6))
        one = ExpertWeights.of((slot1, slot2, *slots_of_biases), slot_of_E=table)
        views = one.slot_views(0)
        assert views.keys() == all_experts.slot_views(expert).keys()
        for part, whole in all_experts.slot_views(expert).items():
            views[part].copy_(whole)
        with torch.no_grad():
            waves.add(one, only=[expert])
    assert torch.equal(waves.result(), resident)


def test_rows_without_an_expert_ignore_undefined_lines():
    ids = torch.tensor([[0, -1], [-1, -1]], dtype=torch.int32)
    grouping = group_tokens(ids, 2)
    y_RD = torch.full((4, 3), float("nan"))
    y_RD[0] = 2.0
    combined = combine_rows(y_RD, grouping, torch.tensor([[0.5, float("nan")], [1.0, 1.0]]))
    assert torch.equal(combined, torch.tensor([[1.0] * 3, [0.0] * 3]))


@pytest.mark.parametrize("slots", [1, 3])
def test_every_slot_is_aligned_and_contiguous(slots):
    buffer = empty_slots(slots, 7, 5, torch.bfloat16)
    assert all(slot.is_contiguous() and slot.data_ptr() % 64 == 0 for slot in buffer)


def test_says_what_does_not_fit():
    ids, (x, weights, fc1, fc2) = problem((4, 2, 3, 8, 8), "random", torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        expert_mlp(x, ids[:, :1], weights, ExpertWeights(fc1, fc2))
    with pytest.raises(ValueError, match="width 7"):
        expert_mlp(x[:, :7], ids, weights, ExpertWeights(fc1, fc2))


def test_says_what_is_wrong_with_the_arguments_before_anything_runs():
    ids, (x, weights, fc1, fc2) = problem((5, 2, 3, 8, 8), "random", torch.float32)
    experts = ExpertWeights(fc1, fc2)

    def refused(x=x, ids=ids, weights=weights, experts=experts):
        with pytest.raises(ValueError) as caught:
            expert_mlp(x, ids, weights, experts)
        return str(caught.value)

    assert "x (4, 8), experts (5, 2) and weights (5, 2) do not fit" in refused(x=x[:4])
    assert "x (1, 5, 8), experts" in refused(x=x[None])
    assert "experts (5, 2) and weights (5, 1) do not fit" in refused(weights=weights[:, :1])
    assert "experts have type torch.float32" in refused(ids=ids.float())
    assert "weights torch.int32" in refused(weights=ids)
    assert "x has width 7" in refused(x=x[:, :7])
    assert "type torch.float64, but the experts take 8 and torch.float32" in refused(x=x.double())
    assert "are on cpu and meta" in refused(x=x.to("meta"))


def test_experts_whose_parts_do_not_belong_together_are_refused():
    def refused(fc1, fc2, **named):
        with pytest.raises(ValueError) as caught:
            ExpertWeights(torch.zeros(fc1), torch.zeros(fc2), **named)
        return str(caught.value)

    assert "fc1 (3, 10, 8) and fc2 (3, 8, 4) do not fit" in refused((3, 10, 8), (3, 8, 4))
    assert "fc1 (2, 8, 8) and fc2 (3, 8, 4) do not fit" in refused((2, 8, 8), (3, 8, 4))
    good = ((3, 8, 8), (3, 8, 4))
    assert "slot_of_E names slot 3, but slots go from 0 to 2" in refused(*good, slot_of_E=(0, 3))
    assert "slot_of_E names slot -2" in refused(*good, slot_of_E=(0, -2))
    sums = MainGrads(torch.zeros(good[0]), torch.zeros(3, 8, 5))
    assert "main_grads are ((3, 8, 8), (3, 8, 5), None, None)" in refused(*good, main_grads=sums)
    biases = {"fc1_bias_SH": torch.zeros(3, 8), "fc2_bias_SD": torch.zeros(3, 8)}
    sums = MainGrads(torch.zeros(good[0]), torch.zeros(good[1]))
    trained = {name: bias.clone().requires_grad_() for name, bias in biases.items()}
    assert "biases, ((3, 8, 8), (3, 8, 4), (3, 8), (3, 8))" in refused(
        *good, main_grads=sums, **trained
    )
    ExpertWeights(torch.zeros(good[0]), torch.zeros(good[1]), main_grads=sums, **biases)  # frozen
    one = {"fc1_bias_SH": torch.zeros(3, 8)}
    assert "fc1_bias is (3, 8) and fc2_bias None; give both, (3, 8) and" in refused(*good, **one)
    short = biases | {"fc2_bias_SD": torch.zeros(3, 7)}
    assert "fc2_bias (3, 7); give both, (3, 8) and (3, 8), or neither" in refused(*good, **short)
    wide = biases | {"fc2_bias_SD": torch.zeros(3, 8).double()}
    assert "float32 and torch.float64; they must have fc1's, torch.float32" in refused(
        *good, **wide
    )


def test_a_slot_names_the_parts_that_fill_it():
    fc1, fc2 = torch.arange(24.0).view(2, 4, 3), torch.arange(12.0).view(2, 3, 2)
    biases = torch.arange(8.0).view(2, 4), torch.arange(6.0).view(2, 3)
    views = ExpertWeights.of((fc1, fc2, *biases)).slot_views(1)
    for part, whole in {"gate": fc1[1, :2], "up": fc1[1, 2:], "down": fc2[1]}.items():
        assert torch.equal(views[part], whole)
    assert views["gate_bias"].tolist() == [4, 5] and views["up_bias"].tolist() == [6, 7]
    views["down_bias"].fill_(9)
    assert biases[1].tolist() == [[0, 1, 2], [9, 9, 9]]
    assert list(ExpertWeights(fc1, fc2).slot_views(0)) == ["gate", "up", "down"]


@pytest.mark.parametrize("kind", [tuple, list])
def test_experts_are_consecutive_whatever_holds_the_table(kind):
    def consecutive(*table):
        weights = torch.zeros(2, 4, 3), torch.zeros(2, 3, 2)
        return ExpertWeights(*weights, slot_of_E=kind(table)).consecutive

    assert consecutive(-1, 0, 1) == range(1, 3)
    assert consecutive(1, 0, -1) is None and consecutive(-1, -1, 1) is None
