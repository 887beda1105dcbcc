"""A rank of benchmarks/peers_parity.py: NeMo Automodel's MoE module, sharding, FSDP and clipping.

Experts run on ``torch_mm`` (grouped products). Its
dispatcher for the CPU gathers all rows of the expert-parallel ranks on each of them.
"""

import torch
import torch.distributed as dist
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.moe.config import MoEConfig
from nemo_automodel.components.moe.layers import MoE
from nemo_automodel.components.moe.parallelizer import apply_ep, apply_fsdp
from nemo_automodel.components.training.utils import scale_grads_and_clip_grad_norm
from peers_parity_case import Block, Problem, Weights, fill, serve
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy


class _Model(nn.Module):
    """What its parallelizer expects of a model."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])

    def forward(self, x_TD: Tensor, target_TO: Tensor) -> Tensor:
        return self.layers[0](x_TD, target_TO)


class Automodel:
    """A model of one block, with its expert parallelism and FSDP."""

    def __init__(self, problem: Problem, ep: int) -> None:
        self._problem, self._world = problem, dist.get_world_size()
        self._moe = MoE(
            _config(problem),
            BackendConfig(linear="torch", experts="torch_mm", dispatcher="torch", rms_norm="torch"),
        )
        fill(self._moe.gate.weight, problem.weights["router"])
        all_ = problem.weights
        fill(self._moe.experts.gate_and_up_projs, torch.cat([all_["gate"], all_["up"]], dim=1).mT)
        fill(self._moe.experts.down_projs, all_["down"].mT)
        self._block = Block(problem, self._moe)
        self._model = _Model(self._block)
        fsdp = init_device_mesh("cpu", (self._world,), mesh_dim_names=("dp_shard",))
        self._mesh = None
        if ep > 1:
            names = ("ep_shard", "ep")
            self._mesh = init_device_mesh("cpu", (self._world // ep, ep), mesh_dim_names=names)
            apply_ep(self._model, self._mesh["ep"])
        apply_fsdp(
            self._model,
            fsdp,
            ep_enabled=ep > 1,
            ep_shard_enabled=1 < ep < self._world,
            ep_shard_mesh=None if self._mesh is None else self._mesh["ep_shard"],
            mp_policy=MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False),
        )
        parameters = self._model.parameters()
        self._sgd = torch.optim.SGD(parameters, lr=problem.lr, foreach=False)

    def step(self) -> tuple[Tensor, float | None]:
        loss = self._model(self._problem.x_TD, self._problem.target_TO)
        loss.backward()
        norm = scale_grads_and_clip_grad_norm(
            self._problem.clip,
            [self._model],
            moe_mesh=self._mesh,
            ep_axis_name=None if self._mesh is None else "ep",
            dp_group_size=self._world,
        )
        self._sgd.step()
        self._sgd.zero_grad()
        return loss, None if self._problem.clip is None else float(norm)

    def weights(self) -> tuple[Weights, range]:
        experts = self._moe.experts
        gate, up = experts.gate_and_up_projs.full_tensor().mT.chunk(2, dim=1)
        return {
            "dense": self._block.dense.weight.full_tensor(),
            "head": self._block.head.weight.full_tensor(),
            "router": self._moe.gate.weight.full_tensor(),
            "gate": gate,
            "up": up,
            "down": experts.down_projs.full_tensor().mT,
        }, range(self._problem.sizes["experts"])


def _config(problem: Problem) -> MoEConfig:
    sizes = problem.sizes
    return MoEConfig(
        n_routed_experts=sizes["experts"],
        n_shared_experts=0,
        n_activated_experts=2,
        n_expert_groups=1,
        n_limited_groups=1,
        train_gate=True,
        gate_bias_update_factor=0.0,
        aux_loss_coeff=0.0,
        score_func="softmax",
        route_scale=1.0,
        dim=sizes["width"],
        inter_dim=sizes["inner"],
        moe_inter_dim=sizes["inner"],
        norm_topk_prob=True,
        softmax_before_topk=True,
        dtype=torch.float32,
    )


if __name__ == "__main__":
    dist.init_process_group("gloo")
    serve(Automodel)
