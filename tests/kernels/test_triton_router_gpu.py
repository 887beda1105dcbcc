"""The Triton router on a GPU: the interpreter's cases, and cases that need a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no package for this system")

from triton_router_cases import *  # noqa: F403
from triton_router_cases import assert_near, expected_outcome, outcome, problem, rule

from moeyard.kernels.router import choose
from moeyard.kernels.trust import trusts_triton_router
from moeyard.moe.routers.routing import RouterInput
from moeyard.moe.routers.topk import TopK, TopKRouter

pytestmark = pytest.mark.gpu

DEEPSEEK = rule(8, score="sigmoid", scale=2.5, num_groups=8, top_groups=4)


@pytest.mark.parametrize("tokens", [1, 300, 3000])
@pytest.mark.parametrize(
    ("rule", "experts"),
    [(rule(2), 8), (rule(8), 128), (rule(10, renormalize=False), 512), (DEEPSEEK, 256)],
    ids=["mixtral", "qwen3", "qwen3_next", "deepseek"],
)
def test_real_sizes_agree_with_torch(rule, experts, tokens):
    logits, bias, valid = problem(tokens, experts, has_bias=rule.num_groups > 1)
    # Far enough apart that rounding cannot change the choice: the margins are 7e-7 or more.
    logits = (logits * 256).round() / 256 + torch.arange(experts, device="cuda") / 2**17
    arguments = (logits, bias, valid, rule)
    assert_near(outcome(*arguments), expected_outcome(*arguments))


def test_is_the_automatic_choice():
    logits, bias, valid = problem(300, 64, has_bias=True)
    assert trusts_triton_router(logits)
    for actual, expected in zip(
        outcome(logits, bias, valid, DEEPSEEK, "auto"),
        outcome(logits, bias, valid, DEEPSEEK),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def test_every_run_gives_the_same_bits():
    arguments = (*problem(20_000, 128, has_bias=True), rule(8))
    for first, second in zip(outcome(*arguments), outcome(*arguments), strict=True):
        assert torch.equal(first, second)


def test_routing_never_waits_for_the_device():
    gate = TopKRouter(TopK(k=4, z_loss=0.1), 64, 32).cuda()
    x = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16)

    def step():
        routing = gate.route(RouterInput(x))
        total = (
            routing.weights_TK.sum()
            + routing.extras["probability_sums_E"].sum()
            + routing.extras["z_sum"]
        )
        return torch.autograd.grad(total, gate.weight)

    step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_follows_new_logits():
    logits, bias, _ = problem(200, 64, has_bias=True)

    def step():
        made = choose(logits, bias, None, DEEPSEEK, True, "triton")
        return (made.experts_TK, made.weights_TK, made.counts_E, *made.sums)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        logits.copy_(problem(200, 64, has_bias=False, seed=seed)[0])
        graph.replay()
        for actual, expected in zip(captured, step(), strict=True):
            assert torch.equal(actual, expected)


def test_offsets_of_logits_do_not_wrap():
    tokens, experts = (1 << 22) + 40, 512
    logits = torch.zeros(tokens, experts, device="cuda")
    logits[-40:] = problem(40, experts, has_bias=False)[0]
    found = outcome(logits, None, None, rule(8), parts=("weights",))
    alone = outcome(logits[-40:].clone(), None, None, rule(8), parts=())
    assert torch.equal(found[0][-40:], alone[0]) and torch.equal(found[1][-40:], alone[1])
    assert int(found[2].sum()) == tokens * 8
    assert found[-1][-40:].abs().sum() > 0
