"""Weights in 8 and 4 bits on a GPU: the interpreter's cases, and cases that need a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no package for this system")

from triton_cases import TOLERANCE, routing
from triton_quantized_cases import *  # noqa: F403
from triton_quantized_cases import assert_near, expected_of, problem, run, weights_of

from moeyard.kernels.experts import TRITON, expert_mlp
from moeyard.kernels.gpu.tiles import is_dequantized
from moeyard.kernels.values.calls import ExpertCall

pytestmark = pytest.mark.gpu
SHAPE = (64, 2, 8, 128, 64)


@pytest.mark.parametrize("tokens", [1, 16, 300, 1024])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (8, 128), (4, 64), (4, 128)])
def test_quantized_real_widths_agree_with_the_reference(bits, group_size, dtype, tokens):
    shape = (tokens, 4, 16, 1024, 512)
    assert is_dequantized(tokens * 4, 16, 1 << 22) == (tokens == 1024)
    inputs, experts = problem(shape, dtype), weights_of(*shape[2:], bits, group_size)
    assert_near(run(inputs, experts), expected_of(inputs, experts), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_is_the_automatic_choice(bits, dtype):
    inputs, experts = problem(SHAPE, dtype), weights_of(*SHAPE[2:], bits, None)
    call = ExpertCall(*(part.cuda() for part in inputs), experts.to("cuda"))
    assert TRITON.misfit(call) is None and TRITON.is_trusted(call)
    assert torch.equal(run(inputs, experts, "auto"), run(inputs, experts))


@pytest.mark.parametrize("tokens", [64, 1024], ids=["widened", "written_out"])
def test_quantized_never_waits_and_a_captured_graph_follows_new_routings(tokens):
    shape = (tokens, *SHAPE[1:])
    experts = weights_of(*shape[2:], 4, None).to("cuda")
    x, ids, weights = (part.cuda() for part in problem(shape, torch.bfloat16))

    def step():
        return expert_mlp(x, ids, weights, experts, "triton")

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for kind in ("with_none", "one_expert_takes_all", "nobody"):
        ids.copy_(routing(kind, *shape[:3]))
        graph.replay()
        assert torch.equal(captured, step()), kind
