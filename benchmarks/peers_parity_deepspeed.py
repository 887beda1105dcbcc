"""A rank of benchmarks/peers_parity.py: DeepSpeed's MoE layer and engine.

``python peers_parity_deepspeed.py [zero1]``. Experts are any module of the user's, here SwiGLU.
No tokens are dropped and the second expert is not sampled, so that there is one right answer.
"""

import sys

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from peers_parity_case import Block, Problem, Weights, experts_of, fill, serve
from torch import Tensor, nn


class _Expert(nn.Module):
    """DeepSpeed copies this module for every expert."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class _Output(nn.Module):
    """The layer without its balance loss and counts."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.layer(x_TD)[0]


class DeepSpeed:
    """A model in DeepSpeed's engine, which reduces, clips and updates."""

    def __init__(self, problem: Problem, ep: int, stage: int) -> None:
        sizes = problem.sizes
        self._ids = experts_of(ep, sizes["experts"])
        layer = MoE(
            hidden_size=sizes["width"],
            expert=_Expert(sizes["width"], sizes["inner"]),
            num_experts=sizes["experts"],
            ep_size=ep,
            k=2,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        self._gate = layer.deepspeed_moe.gate.wg
        self._experts = layer.deepspeed_moe.experts.deepspeed_experts
        fill(self._gate.weight, problem.weights["router"])
        for name, values in problem.experts(self._ids).items():
            for expert, value in zip(self._experts, values, strict=True):
                fill(getattr(expert, name).weight, value)
        self._model = Block(problem, _Output(layer))
        self._problem = problem
        groups = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(self._model.parameters()), "name": "all"}
        )
        self._engine, *_ = deepspeed.initialize(
            model=self._model,
            optimizer=torch.optim.SGD(groups, lr=problem.lr),
            config={
                "train_micro_batch_size_per_gpu": problem.x_TD.shape[0],
                "gradient_clipping": problem.clip or 0.0,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 1_000_000,
            },
        )

    def step(self) -> tuple[Tensor, float | None]:
        loss = self._engine(self._problem.x_TD, self._problem.target_TO)
        self._engine.backward(loss)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return loss, None if norm is None else float(norm)

    def weights(self) -> tuple[Weights, range]:
        names = ("gate", "up", "down")
        experts = {n: torch.stack([getattr(e, n).weight for e in self._experts]) for n in names}
        return {
            "dense": self._model.dense.weight,
            "head": self._model.head.weight,
            "router": self._gate.weight,
            **experts,
        }, self._ids


if __name__ == "__main__":
    deepspeed.init_distributed(dist_backend="gloo")
    zero = 1 if "zero1" in sys.argv else 0
    serve(lambda problem, ep: DeepSpeed(problem, ep, zero))
