"""A rank of benchmarks/peers_parity.py: transformers' Qwen3-MoE block under DDP, grouped_mm.

Clipping is torch's, as in every loop around DDP.
"""

import torch
import torch.distributed as dist
from peers_parity_case import Block, Problem, Weights, fill, serve
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock


class _Flat(nn.Module):
    """The block takes ``[sequences, tokens, D]``."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.block(x_TD.unsqueeze(0)).squeeze(0)


class HuggingFace:
    """The block, DDP and SGD."""

    def __init__(self, problem: Problem, ep: int) -> None:
        assert ep == 1, "DDP holds all experts on every rank"
        sizes = problem.sizes
        config = Qwen3MoeConfig(
            hidden_size=sizes["width"],
            moe_intermediate_size=sizes["inner"],
            num_experts=sizes["experts"],
            num_experts_per_tok=2,
            norm_topk_prob=True,
        )
        config._experts_implementation = "grouped_mm"
        self._block = Qwen3MoeSparseMoeBlock(config)
        all_ = problem.weights
        fill(self._block.gate.weight, all_["router"])
        fill(self._block.experts.gate_up_proj, torch.cat([all_["gate"], all_["up"]], dim=1))
        fill(self._block.experts.down_proj, all_["down"])
        self._model = Block(problem, _Flat(self._block))
        self._ddp = DistributedDataParallel(self._model, gradient_as_bucket_view=True)
        self._sgd = torch.optim.SGD(self._model.parameters(), lr=problem.lr, fused=True)
        self._problem = problem

    def step(self) -> tuple[Tensor, float]:
        loss = self._ddp(self._problem.x_TD, self._problem.target_TO)
        loss.backward()
        clip = float("inf") if self._problem.clip is None else self._problem.clip
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), clip)
        self._sgd.step()
        self._sgd.zero_grad(set_to_none=False)
        return loss, float(norm)

    def weights(self) -> tuple[Weights, range]:
        gate, up = self._block.experts.gate_up_proj.chunk(2, dim=1)
        return {
            "dense": self._model.dense.weight,
            "head": self._model.head.weight,
            "router": self._block.gate.weight,
            "gate": gate,
            "up": up,
            "down": self._block.experts.down_proj,
        }, range(self._problem.sizes["experts"])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    serve(HuggingFace)
