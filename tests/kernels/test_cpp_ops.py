"""The C++ kernels as operators, under torch.compile and torch's checks of operators."""

import pytest
import torch

from moeyard.kernels.cpu import library, ops
from moeyard.kernels.experts import expert_mlp
from moeyard.kernels.values.expert_weights import ExpertWeights
from moeyard.kernels.values.main_grads import MainGrads
from moeyard.kernels.values.quantize import quantize_experts

pytestmark = pytest.mark.skipif(library.load().functions is None, reason=library.load().state)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _forget_graphs():
    """Dynamo refuses a function that it compiled for too many cases, also those of other tests."""
    torch._dynamo.reset()


BIASES = pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "biased"])


def problem(dtype, tokens=19, has_bias=False):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 5, (tokens, 2), generator=g)
    x = torch.randn(tokens, 64, generator=g).to(dtype)
    weights = torch.rand(tokens, 2, generator=g)
    fc1 = (torch.randn(4, 192, 64, generator=g) / 8).to(dtype)
    fc2 = (torch.randn(4, 64, 96, generator=g) / 8).to(dtype)
    table = (2, 0, 3, 1, -1)
    ids[ids == 4] = -1  # expert 4 is not here
    leaves = [x, weights, fc1, fc2]
    if has_bias:
        leaves += (torch.randn(4, width, generator=g).to(dtype) for width in (192, 64))
    return ids, [leaf.requires_grad_() for leaf in leaves], table


def run(ids, leaves, table, main_grads=None):
    x, weights, fc1, fc2, *biases = leaves
    experts = ExpertWeights.of((fc1, fc2, *biases), slot_of_E=table, main_grads=main_grads)
    return expert_mlp(x, ids, weights, experts) * 2


@DTYPES
@BIASES
def test_a_compiled_graph_has_no_break_and_the_bits_of_eager(dtype, has_bias):
    ids, leaves, table = problem(dtype, has_bias=has_bias)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    found = []
    for function in (run, compiled):
        y = function(ids, leaves, table)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    for eager, other in zip(*found, strict=True):
        assert torch.equal(eager, other)
    with torch.no_grad():
        assert torch.equal(run(ids, leaves, table), compiled(ids, leaves, table))


@BIASES
@pytest.mark.parametrize("is_empty", [False, True], ids=["filled", "empty"])
def test_a_compiled_backward_adds_to_main_gradients(is_empty, has_bias):
    ids, leaves, table = problem(torch.float32, has_bias=has_bias)
    totals = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        fill = float("nan") if is_empty else 1.0  # the contents of an empty sum must not matter
        filled = [torch.full(leaf.shape, fill) for leaf in leaves[2:]]
        sums = MainGrads.of(filled, is_empty=is_empty)
        for _ in range(2):
            y = function(ids, leaves, table, sums)
            torch.autograd.grad(y.square().sum(), leaves[:2])
        totals.append(filled)
    for eager, other in zip(*totals, strict=True):
        assert torch.equal(eager, other)


@pytest.mark.parametrize("kind", ["odd widths", "wide sums"])
def test_what_the_kernels_backward_does_not_take_is_left_to_torch(kind):
    ids, (x, weights, fc1, fc2), _ = problem(torch.float32)
    sums = None
    if kind == "odd widths":
        odd = (x[:, :63], fc1[:, :190, :63], fc2[:, :63, :95])
        x, fc1, fc2 = (part.detach().contiguous().requires_grad_() for part in odd)
    else:
        sums = MainGrads(torch.zeros(4, 192, 64).double(), torch.zeros(4, 64, 96).double())
    leaves, found = [x, weights, fc1, fc2], []
    for function in (run, torch.compile(run, backend="aot_eager")):
        y = function(ids, leaves, None, sums)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves[:2])])
    for eager, other in zip(*found, strict=True):
        assert torch.equal(eager, other)


@DTYPES
@pytest.mark.parametrize(("bits", "has_bias"), [(8, False), (4, False), (4, True)])
def test_quantized_experts_stand_in_a_compiled_graph(dtype, bits, has_bias):
    ids, leaves, table = problem(dtype, has_bias=has_bias)
    x, weights = leaves[0].detach(), leaves[1].detach()
    fc1, fc2, *biases = leaves[2:]
    plain = ExpertWeights.of((fc1, fc2, *biases), slot_of_E=table)
    experts = quantize_experts(plain, bits, 32)
    compiled = torch.compile(
        lambda x: expert_mlp(x, ids, weights, experts) + 1, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x), expert_mlp(x, ids, weights, experts) + 1)


@BIASES
def test_fake_versions_and_schemas_say_the_truth(has_bias):
    ids, leaves, table = problem(torch.float32, has_bias=has_bias)
    x, weights, fc1, fc2, *biases = (leaf.detach() for leaf in leaves)
    rows, biases = (x, ids.int(), weights), biases or [None, None]
    checks = ("test_schema", "test_faketensor")
    forward = (*rows, fc1, fc2, *biases, list(table), *(None,) * 4, "swiglu", True)
    torch.library.opcheck(ops.expert_mlp_op, forward, test_utils=checks)
    hidden = ops.expert_mlp_op(*forward)[1]
    for add in (True, False):
        outs = (None if p is None else torch.zeros(p.shape) for p in (fc1, fc2, *biases))
        backward = (x, *rows, hidden, fc1, fc2, *biases, list(table), "swiglu", add, *outs)
        torch.library.opcheck(ops.expert_mlp_backward_op, backward, test_utils=checks)
    experts = quantize_experts(ExpertWeights(fc1, fc2), 8)
    parts = (experts.fc1.values, experts.fc1.scales_SQG, experts.fc2.values, experts.fc2.scales_SQG)
    arguments = (*rows, *parts, *biases, list(table), "swiglu")
    torch.library.opcheck(ops.quantized_expert_mlp_op, arguments, test_utils=checks)


def test_ids_out_of_range_are_an_error_in_a_compiled_graph_too():
    ids, leaves, table = problem(torch.float32)
    ids[3, 1] = 7
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"expert id 7 is outside \[-1, 5\)"):
        compiled(ids, leaves, table)
