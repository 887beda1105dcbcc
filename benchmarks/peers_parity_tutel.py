"""A rank of benchmarks/peers_parity.py: Tutel's MoE layer, trained as its helloworld_ddp.py does.

EP is 1 or all ranks, as in its examples. DDP reduces everything but the experts that a rank has
alone. Tutel has no clipping: it is torch's, as in the loop of a user. No tokens are dropped
(capacity 0), and experts are its ``llama_ffn``: SwiGLU.
"""

import torch
import torch.distributed as dist
from peers_parity_case import Block, Problem, Weights, experts_of, fill, serve
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tutel import moe, system


class Tutel:
    """Tutel's layer, DDP and SGD."""

    def __init__(self, problem: Problem, ep: int) -> None:
        assert ep in (1, dist.get_world_size()), "Tutel's examples split experts over all ranks"
        sizes = problem.sizes
        self._ids = experts_of(ep, sizes["experts"])
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        self._layer = moe.moe_layer(
            gate_type={"type": "top", "k": 2, "capacity_factor": 0, "fp32_gate": True},
            experts={
                "type": "llama_ffn",
                "num_experts_per_device": len(self._ids),
                "hidden_size_per_expert": sizes["inner"],
            },
            model_dim=sizes["width"],
            scan_expert_func=lambda _, p: setattr(p, "skip_allreduce", ep > 1),
            group=alone[dist.get_rank()] if ep == 1 else None,
        )
        fill(self._layer.gates[0].wg.weight, problem.weights["router"])
        for ours, theirs in (("gate", "W_fc1"), ("up", "W_fc2"), ("down", "W_fc3")):
            parameter = getattr(self._layer.experts, theirs)
            fill(parameter, problem.experts(self._ids)[ours].mT.reshape(-1))
        self._model = Block(problem, self._layer)
        self._model._ddp_params_and_buffers_to_ignore = [
            n for n, p in self._model.named_parameters() if getattr(p, "skip_allreduce", False)
        ]
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
        experts = self._layer.experts
        num, width, inner = len(self._ids), *(self._problem.sizes[n] for n in ("width", "inner"))
        return {
            "dense": self._model.dense.weight,
            "head": self._model.head.weight,
            "router": self._layer.gates[0].wg.weight,
            "gate": experts.W_fc1.view(num, width, inner).mT,
            "up": experts.W_fc2.view(num, width, inner).mT,
            "down": experts.W_fc3.view(num, inner, width).mT,
        }, self._ids


if __name__ == "__main__":
    system.init_data_model_parallel(backend="gloo")
    serve(Tutel)
