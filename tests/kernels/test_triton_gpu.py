"""The Triton kernels on a GPU: the interpreter's cases, and cases that need a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no package for this system")

from triton_cases import *  # noqa: F403
from triton_cases import TOLERANCE, assert_near, expected_outcome, outcome, problem, routing

from moeyard.kernels.experts import TRITON, expert_mlp
from moeyard.kernels.values.calls import ExpertCall
from moeyard.kernels.values.expert_weights import ExpertWeights

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tokens", [1, 16, 300, 4096])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_real_widths_agree_with_the_reference(tokens, dtype):
    shape = (tokens, 4, 16, 1024, 512)
    ids, leaves = routing("with_none", *shape[:3]), problem(shape, dtype)
    assert_near(outcome(ids, leaves), expected_outcome(ids, leaves), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_is_the_automatic_choice(dtype):
    shape = (64, 2, 4, 64, 64)
    ids, leaves = routing("random", *shape[:3]), problem(shape, dtype)
    call = ExpertCall(leaves[0], ids.cuda(), leaves[1], ExpertWeights(*leaves[2:]))
    assert TRITON.misfit(call) is None and TRITON.is_trusted(call)
    for actual, expected in zip(outcome(ids, leaves, "auto"), outcome(ids, leaves), strict=True):
        assert torch.equal(actual, expected)


def test_never_waits_for_the_device():
    shape = (300, 4, 16, 128, 64)
    ids, leaves = routing("random", *shape[:3]).cuda(), problem(shape, torch.bfloat16)
    table = tuple(range(16))
    upstream = torch.randn(300, 128, device="cuda", dtype=torch.bfloat16)
    experts = ExpertWeights(leaves[2], leaves[3], slot_of_E=table)

    def step():
        y = expert_mlp(leaves[0], ids, leaves[1], experts, "triton")
        return torch.autograd.grad(y, leaves, upstream)

    step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_follows_new_routings():
    shape = (200, 2, 8, 128, 64)
    leaves = problem(shape, torch.float32)
    ids = routing("random", *shape[:3]).cuda()
    upstream = torch.randn(200, 128, device="cuda")

    def step():
        y = expert_mlp(leaves[0], ids, leaves[1], ExpertWeights(*leaves[2:]), "triton")
        return (y, *torch.autograd.grad(y, leaves, upstream))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for kind in ("with_none", "one_expert_takes_all", "nobody"):
        ids.copy_(routing(kind, *shape[:3]))
        graph.replay()
        for actual, expected in zip(captured, step(), strict=True):
            assert torch.equal(actual, expected), kind


@pytest.mark.parametrize(
    "shape",
    [(64, 1, 130, 4096, 2048), (1 << 18, 2, 2, 64, 4096)],
    ids=["weights_beyond_2**31_elements", "rows_beyond_2**31_elements"],
)
def test_offsets_do_not_wrap(shape):
    """The last expert's rows, far from the start of every tensor, agree with a small call."""
    tokens, choices, experts, d_model, d_expert = shape
    g = torch.Generator("cuda").manual_seed(0)
    dtype = torch.bfloat16

    def random(*size):
        return torch.randn(size, generator=g, device="cuda", dtype=dtype)

    x = random(tokens, d_model).requires_grad_()
    fc1 = random(experts, 2 * d_expert, d_model).mul_(d_model**-0.5).requires_grad_()
    fc2 = random(experts, d_model, d_expert).mul_(d_expert**-0.5).requires_grad_()
    weights = torch.ones(tokens, choices, device="cuda")
    ids = torch.zeros(tokens, choices, dtype=torch.int64, device="cuda")
    ids[-32:] = experts - 1
    y = expert_mlp(x, ids, weights, ExpertWeights(fc1, fc2), "triton")
    grads = torch.autograd.grad(y[-32:].float().sum(), (x, fc1, fc2))
    few = [leaf.detach().requires_grad_() for leaf in (x[-32:], fc1[-1:], fc2[-1:])]
    few_ids = torch.zeros_like(ids[-32:])
    expected = expert_mlp(few[0], few_ids, weights[-32:], ExpertWeights(*few[1:]), "torch")
    few_grads = torch.autograd.grad(expected.float().sum(), few)
    torch.testing.assert_close(y[-32:], expected, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(grads[0][-32:], few_grads[0], rtol=3e-2, atol=3e-2)
    for found, wanted in zip(grads[1:], few_grads[1:], strict=True):
        scale = wanted.abs().max()
        torch.testing.assert_close(found[-1:] / scale, wanted / scale, rtol=3e-2, atol=3e-2)
