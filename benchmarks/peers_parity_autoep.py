"""A rank of benchmarks/peers_parity.py: DeepSpeed's AutoEP, which splits transformers' MoE block.

``python peers_parity_autoep.py [zero1]``. AutoEP replaces the Qwen3-MoE block by its own layer.
"""

import sys

import deepspeed
import torch
from peers_parity_case import Block, Problem, Weights, experts_of, fill, serve
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock


class _Flat(nn.Module):
    """The block takes ``[sequences, tokens, D]``."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_TD: Tensor) -> Tensor:
        found = self.block(x_TD.unsqueeze(0))
        return (found[0] if isinstance(found, tuple) else found).squeeze(0)


class AutoEP:
    """A model in DeepSpeed's engine."""

    def __init__(self, problem: Problem, ep: int, stage: int) -> None:
        sizes, all_ = problem.sizes, problem.weights
        self._ids = experts_of(ep, sizes["experts"])
        config = Qwen3MoeConfig(
            hidden_size=sizes["width"],
            moe_intermediate_size=sizes["inner"],
            num_experts=sizes["experts"],
            num_experts_per_tok=2,
            norm_topk_prob=True,
        )
        block = Qwen3MoeSparseMoeBlock(config)
        fill(block.gate.weight, all_["router"])
        fill(block.experts.gate_up_proj, torch.cat([all_["gate"], all_["up"]], dim=1))
        fill(block.experts.down_proj, all_["down"])
        self._model = Block(problem, _Flat(block))
        self._model.config = config
        self._problem = problem
        self._engine, *_ = deepspeed.initialize(
            model=self._model,
            model_parameters=self._model.parameters(),
            config={
                "train_micro_batch_size_per_gpu": problem.x_TD.shape[0],
                "gradient_clipping": problem.clip or 0.0,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "optimizer": {"type": "SGD", "params": {"lr": problem.lr}},
                "expert_parallel": {
                    "enabled": True,
                    "autoep_size": ep,
                    "preset_model": "qwen3_moe",
                    "moe_layer_pattern": r"moe\.block",
                },
                "steps_per_print": 1_000_000,
            },
        )
        self._layer = self._engine.module.moe.block

    def step(self) -> tuple[Tensor, float | None]:
        loss = self._engine(self._problem.x_TD, self._problem.target_TO)
        self._engine.backward(loss)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return loss, None if norm is None else float(norm)

    def weights(self) -> tuple[Weights, range]:
        model, experts = self._engine.module, self._layer.experts
        return {
            "dense": model.dense.weight,
            "head": model.head.weight,
            "router": self._layer.router.gate.weight,
            "gate": experts.w1,
            "up": experts.w3,
            "down": experts.w2,
        }, self._ids


if __name__ == "__main__":
    deepspeed.init_distributed(dist_backend="gloo")
    zero = 1 if "zero1" in sys.argv else 0
    serve(lambda problem, ep: AutoEP(problem, ep, zero))
