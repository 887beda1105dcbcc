"""Other libraries' expert MLPs on a CPU, behind the call that ``expert_mlp_cpu.py`` times.

R routed rows, E experts, D model width, F expert width.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from expert_mlp_cpu_case import Case
from torch import Tensor, nn

Run = Callable[[], Any]
BATCHED_TOKENS = 16
"""batched_mm copies the weights of every routed row: 6 GB for 512 tokens of the smallest layer."""
DEEPSPEED_TOKENS = 512
"""DeepSpeed dispatches through a tensor [T, E, rows of the fullest expert]: gigabytes beyond."""


def _timed(case: Case, has_backward: bool, forward: Callable[[], Tensor]) -> Run:
    if not has_backward:
        return torch.no_grad()(forward)
    weights = [case.experts.fc1_SHD, case.experts.fc2_SDF]

    def both() -> tuple[Tensor, ...]:
        leaves = (case.x_TD, case.weights_TK, *weights)
        return torch.autograd.grad(forward(), leaves, case.upstream_TD)

    return both


def grouped_mm(case: Case, has_backward: bool) -> Run:
    """Sort by expert, ``F.grouped_mm`` twice, weigh and sum with ``index_add``."""
    fc1_EHD, fc2_EDF = case.experts.fc1_SHD, case.experts.fc2_SDF
    num_experts, num_choices = case.layer.num_experts, case.layer.num_choices

    def forward() -> Tensor:
        ids_R = case.experts_TK.flatten()
        order_R = ids_R.argsort(stable=True)
        ends_E = torch.bincount(ids_R, minlength=num_experts).cumsum(0).int()
        tokens_R = order_R // num_choices
        h_RH = F.grouped_mm(case.x_TD[tokens_R], fc1_EHD.mT, offs=ends_E)
        gate_RF, up_RF = h_RH.chunk(2, dim=-1)
        y_RD = F.grouped_mm(F.silu(gate_RF) * up_RF, fc2_EDF.mT, offs=ends_E)
        y_RD = y_RD * case.weights_TK.flatten()[order_R, None].to(y_RD.dtype)
        return torch.zeros_like(case.x_TD).index_add(0, tokens_R, y_RD)

    return _timed(case, has_backward, forward)


def _huggingface(implementation: str) -> Callable[[Case, bool], Run | None]:
    """Build transformers' Qwen3-MoE experts in one of its implementations."""

    def build(case: Case, has_backward: bool) -> Run | None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        if implementation == "batched_mm" and case.x_TD.shape[0] > BATCHED_TOKENS:
            return None
        config = Qwen3MoeConfig(
            hidden_size=case.layer.d_model,
            moe_intermediate_size=case.layer.d_expert,
            num_experts=case.layer.num_experts,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        del module.gate_up_proj, module.down_proj
        module.gate_up_proj, module.down_proj = case.experts.fc1_SHD, case.experts.fc2_SDF

        def forward() -> Tensor:
            weights_TK = case.weights_TK.to(case.x_TD.dtype)
            return module(case.x_TD, case.experts_TK, weights_TK)

        return _timed(case, has_backward, forward)

    return build


class _Expert(nn.Module):
    """DeepSpeed copies this module for every expert."""

    def __init__(self, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, 2 * d_expert, bias=False)
        self.fc2 = nn.Linear(d_expert, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * up)


def deepspeed(case: Case, has_backward: bool) -> Run | None:
    """Build DeepSpeed's MoE layer, whose router is part of it; so its results are not compared."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from deepspeed.moe.layer import MoE
    except ImportError:
        return None
    if case.x_TD.shape[0] > DEEPSPEED_TOKENS:
        return None
    if not torch.distributed.is_initialized():
        import deepspeed

        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
        deepspeed.init_distributed("gloo")
    layer = case.layer
    module = MoE(
        hidden_size=layer.d_model,
        expert=_Expert(layer.d_model, layer.d_expert),
        num_experts=layer.num_experts,
        k=layer.num_choices,
        drop_tokens=False,
    )
    module.set_deepspeed_parallelism()
    module = module.to(case.x_TD.dtype)
    upstream = case.upstream_TD.unsqueeze(0)

    def run() -> None:
        y, *_ = module(case.x_TD.unsqueeze(0))
        if has_backward:
            torch.autograd.grad(y, [case.x_TD, *module.parameters()], upstream, allow_unused=True)

    return run if has_backward else torch.no_grad()(run)


PEERS = {
    "F.grouped_mm": grouped_mm,
    "transformers eager": _huggingface("eager"),
    "transformers grouped_mm": _huggingface("grouped_mm"),
    "transformers batched_mm": _huggingface("batched_mm"),
    "DeepSpeed MoE": deepspeed,
}
