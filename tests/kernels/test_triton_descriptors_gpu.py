"""Tiles through descriptors on a Hopper GPU: the cases of the interpreter, and real widths."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no package for this system")

from triton_cases import assert_near, expected_outcome, outcome, problem, routing
from triton_descriptor_cases import *  # noqa: F403

from moeyard.kernels.expert_mlp import expert_mlp
from moeyard.kernels.expert_weights import ExpertWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
        reason="not a Hopper GPU",
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_described_tiles_at_real_widths_agree_with_the_reference(calls, dtype):
    shape = (4096, 4, 16, 1024, 512)
    ids, leaves = routing("with_none", *shape[:3]), problem(shape, dtype)
    assert_near(outcome(ids, leaves), expected_outcome(ids, leaves), dtype)
    assert len(calls) == 3


def test_described_tiles_in_a_captured_graph_follow_new_routings(calls):
    shape = (1024, 4, 16, 256, 128)
    leaves, ids = problem(shape, torch.bfloat16), routing("random", *shape[:3]).cuda()
    upstream = torch.randn(1024, 256, device="cuda", dtype=torch.bfloat16)

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
    assert calls
