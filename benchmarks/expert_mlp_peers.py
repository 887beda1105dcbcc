"""Other libraries' expert MLPs behind the call that ``expert_mlp.py`` times.

None is a dependency: they are imported inside functions, and a missing library is a line of the
table. E experts, D model width, F expert width.
"""

from collections.abc import Callable
from typing import Any

import torch
from expert_mlp_problem import Problem
from torch import Tensor


def _scattermoe(problem: Problem, has_backward: bool) -> Callable[[], Any]:
    """Build github.com/shawntan/scattermoe's GLUMLP, whose fc1 has up before gate."""
    from scattermoe.mlp import GLUMLP

    experts, d_model, d_expert = problem.fc2_EDF.shape
    with torch.device("meta"):
        module = GLUMLP(d_model, d_expert, experts, problem.experts_TK.shape[1])
    gate_EFD, up_EFD = problem.fc1_EHD.detach().chunk(2, dim=1)
    module.experts.weight = torch.nn.Parameter(torch.cat([up_EFD, gate_EFD], dim=1))
    module.output_experts.weight = torch.nn.Parameter(problem.fc2_EDF.detach())
    weights_TK = problem.weights_TK.to(problem.x_TD.dtype)
    return _timed(
        problem,
        has_backward,
        lambda: module(problem.x_TD, weights_TK, problem.experts_TK),
        list(module.parameters()),
    )


def _megablocks(problem: Problem, has_backward: bool) -> Callable[[], Any]:
    """Build MegaBlocks' dropless MLP on grouped products; its sparse one no longer runs."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    experts, d_model, d_expert = problem.fc2_EDF.shape
    arguments = Arguments(
        hidden_size=d_model,
        ffn_hidden_size=d_expert,
        moe_num_experts=experts,
        moe_top_k=problem.experts_TK.shape[1],
        mlp_type="glu",
        mlp_impl="grouped",
        activation_fn=torch.nn.functional.silu,
        bias=False,
        return_bias=False,
        fp16=False,
        bf16=True,
        device=problem.x_TD.device,
    )
    module = ParallelDroplessMLP(arguments)
    gate_EFD, up_EFD = problem.fc1_EHD.detach().chunk(2, dim=1)
    module.mlp.w1 = torch.nn.Parameter(gate_EFD.flatten(0, 1))
    module.mlp.v1 = torch.nn.Parameter(up_EFD.flatten(0, 1))
    module.mlp.w2 = torch.nn.Parameter(problem.fc2_EDF.detach().mT.flatten(0, 1))
    weights_TK = problem.weights_TK.to(problem.x_TD.dtype)
    return _timed(
        problem,
        has_backward,
        lambda: module.forward_once(problem.x_TD, weights_TK, problem.experts_TK)[0],
        [module.mlp.w1, module.mlp.v1, module.mlp.w2],
    )


def _transformers(problem: Problem, has_backward: bool) -> Callable[[], Any]:
    """Build transformers' Qwen3-MoE experts on ``F.grouped_mm``."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts, d_model, d_expert = problem.fc2_EDF.shape
    config = Qwen3MoeConfig(
        hidden_size=d_model, moe_intermediate_size=d_expert, num_experts=experts
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(problem.fc1_EHD.detach())
    module.down_proj = torch.nn.Parameter(problem.fc2_EDF.detach())
    weights_TK = problem.weights_TK.detach().to(problem.x_TD.dtype)
    return _timed(
        problem,
        has_backward,
        lambda: module(problem.x_TD, problem.experts_TK, weights_TK),
        list(module.parameters()),
    )


def _timed(
    problem: Problem,
    has_backward: bool,
    forward: Callable[[], Tensor],
    parameters: list[torch.nn.Parameter],
) -> Callable[[], Any]:
    if not has_backward:
        return torch.no_grad()(forward)

    def both() -> tuple[Tensor, ...]:
        leaves = (problem.x_TD, *parameters)
        return torch.autograd.grad(forward(), leaves, problem.upstream_TD)[:1]

    return both


def _late(build: Callable[[Problem, bool], Callable[[], Any]]) -> Any:
    """Build on the first call, where a missing library becomes a line of the table."""

    def builder(problem: Problem, has_backward: bool) -> Callable[[], Any]:
        built: list[Callable[[], Any]] = []

        def call() -> Any:
            if not built:
                built.append(build(problem, has_backward))
            return built[0]()

        return call

    return builder


PEERS = {
    "transformers grouped_mm": _late(_transformers),
    "ScatterMoE": _late(_scattermoe),
    "MegaBlocks": _late(_megablocks),
}
