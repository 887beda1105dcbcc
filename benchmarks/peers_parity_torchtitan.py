"""A rank of benchmarks/peers_parity.py: torchtitan's MoE module, sharding, FSDP and clipping.

Experts compute in bf16, whatever type the model has. Its meshes are made for the CPU by telling it
so before its modules ask for a GPU.
"""

import torch
import torch.distributed as dist
import torchtitan.tools.utils as titan
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

titan.device_type, titan.device_module = "cpu", torch.cpu  # before the imports below read them

from peers_parity_case import Block, Problem, Weights, fill, serve  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder  # noqa: E402
from torchtitan.distributed.utils import clip_grad_norm_, set_spmd_backend  # noqa: E402
from torchtitan.models.common.linear import Linear  # noqa: E402
from torchtitan.models.common.moe import (  # noqa: E402
    GroupedExperts,
    MoE,
    RoutedExperts,
    TokenChoiceTopKRouter,
)
from torchtitan.models.common.moe_sharding import set_moe_sharding_config  # noqa: E402
from torchtitan.models.common.token_dispatcher import (  # noqa: E402
    AllToAllTokenDispatcher,
    LocalTokenDispatcher,
)

PARTS = {"gate": "w1_EFD", "up": "w3_EFD", "down": "w2_EDF"}
BACKEND = "partial_dtensor"


class _Flat(nn.Module):
    """The module takes ``[sequences, tokens, D]``."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.inner = moe
        self.routed_experts = moe.routed_experts

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.inner(x_TD.unsqueeze(0)).squeeze(0)


class _Decoder(nn.Module):
    """What apply_fsdp_to_decoder expects of a model."""

    tok_embeddings = norm = lm_head = None
    enable_weight_tying = False

    def __init__(self, block: Block) -> None:
        super().__init__()
        block.moe_enabled = True
        self.layers = nn.ModuleDict({"0": block})

    def forward(self, x_TD: Tensor, target_TO: Tensor) -> Tensor:
        return self.layers["0"](x_TD, target_TO)


class Torchtitan:
    """A decoder of one block, as torchtitan's trainer puts it together."""

    def __init__(self, problem: Problem, ep: int) -> None:
        self._problem, self._ep = problem, ep
        world = dist.get_world_size()
        dims = ParallelDims(1, world, 1, 1, 1, ep, world, BACKEND)
        dims.build_mesh()
        moe = self._build_moe()
        fill(moe.router.gate.weight, problem.weights["router"])
        for ours, theirs in PARTS.items():
            fill(getattr(moe.routed_experts.inner_experts, theirs), problem.weights[ours])
        if ep > 1:
            moe.parallelize(dims)
        self._moe, self._block = moe, Block(problem, _Flat(moe))
        self._model = _Decoder(self._block)
        apply_fsdp_to_decoder(
            self._model,
            dims.get_mesh(["fsdp"]),
            param_dtype=torch.float32,
            reduce_dtype=torch.float32,
            pp_enabled=False,
            ep_degree=ep,
            edp_mesh=dims.get_optional_mesh(["efsdp"]) if ep > 1 else None,
        )
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        parameters = self._model.parameters()
        self._sgd = torch.optim.SGD(parameters, lr=problem.lr, foreach=False)

    def _build_moe(self) -> MoE:
        sizes = self._problem.sizes
        width, experts = sizes["width"], sizes["experts"]
        dispatcher = LocalTokenDispatcher if self._ep == 1 else AllToAllTokenDispatcher
        config = MoE.Config(
            num_experts=experts,
            load_balance_coeff=None,
            routed_experts=RoutedExperts.Config(
                inner_experts=GroupedExperts.Config(
                    dim=width, hidden_dim=sizes["inner"], num_experts=experts
                ),
                token_dispatcher=dispatcher.Config(num_experts=experts, top_k=2),
            ),
            router=TokenChoiceTopKRouter.Config(
                num_experts=experts,
                gate=Linear.Config(in_features=width, out_features=experts),
                top_k=2,
                score_func="softmax",
                route_norm=True,
            ),
        )
        if self._ep > 1:
            set_moe_sharding_config(
                config, enable_ep=True, enable_sp=False, expert_param_layout=_layout()
            )
        return config.build()

    def step(self) -> tuple[Tensor, float]:
        loss = self._model(self._problem.x_TD, self._problem.target_TO)
        (loss / dist.get_world_size()).backward()  # its losses are sums over the global tokens
        clip = float("inf") if self._problem.clip is None else self._problem.clip
        norm = clip_grad_norm_(self._model.parameters(), clip, ep_enabled=self._ep > 1)
        self._sgd.step()
        self._sgd.zero_grad()
        return loss, float(norm)

    def weights(self) -> tuple[Weights, range]:
        experts = self._moe.routed_experts.inner_experts
        found = {
            "dense": self._block.dense.weight,
            "head": self._block.head.weight,
            "router": self._moe.router.gate.weight,
        } | {ours: getattr(experts, theirs) for ours, theirs in PARTS.items()}
        whole = {name: value.full_tensor() for name, value in found.items()}
        return whole, range(self._problem.sizes["experts"])


def _layout() -> dict:
    """Return how experts would be cut by tensor parallelism, which is off."""
    import spmd_types as spmd

    return {"w1_EFD": spmd.S(1), "w2_EDF": spmd.S(2), "w3_EFD": spmd.S(1)}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    set_spmd_backend(BACKEND)
    serve(Torchtitan)
