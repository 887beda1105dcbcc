"""LoRA experts (LLaVA-MoLE, Chen et al. 2024): low-rank updates of an MLP, one for each token.

A dense MLP keeps its frozen weights. A router chooses one of E updates for a token, from what the
MLP reads. The update is of gate, up and down: one decision for all three. A token costs a router
and the products of one plain LoRA of the same rank.

T tokens, E LoRA experts, P rank, D model width, F inner width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...kernels.gated import gated
from ...kernels.routed_low_rank import group_rows, routed_low_rank
from ...kernels.values.low_rank import LowRank, Update
from ..adapters.rows import AdapterRows
from ..gated_mlp import GatedMLP
from ..routers.routing import Routing
from ..routers.sizes import RouterSizes
from ..routers.topk import TopK, TopKRouter

Weighting = Literal["none", "probability"]
"""``none``: the chosen update counts whole, so the router learns from the balance loss alone (the
paper's sparse path). ``probability``: it is multiplied by its probability, so the router learns
from the task, too (as in Switch)."""


@dataclass(frozen=True, slots=True)
class LoraMixture:
    """How many LoRA experts an MLP has, and how they are chosen."""

    num_experts: int
    weighting: Weighting = "none"
    balance_loss: float = 0.0

    def router(self, d_model: int) -> TopKRouter:
        """Return the router, untrained: linear with a bias, softmax, top 1."""
        config = TopK(
            k=1,
            logit_bias=True,
            renormalize=self.weighting == "none",
            balance_loss=self.balance_loss,
        )
        return config.build(RouterSizes(d_model, self.num_experts))


class LoraExperts(nn.Module):
    """A and B of all LoRA experts of an MLP; B is 0, and the caller must fill A.

    ``fc1_lora_a [E, 2P, D]``, the A of the gate first, then of up; ``fc1_lora_b [E, 2F, P]``
    likewise; ``fc2_lora_a [E, P, F]``; ``fc2_lora_b [E, D, P]``.
    """

    def __init__(self, num_experts: int, rank: int, scale: float, like_DF: Tensor) -> None:
        super().__init__()
        d_model, d_ff = like_DF.shape
        shapes = ((2 * rank, d_model), (2 * d_ff, rank), (rank, d_ff), (d_model, rank))
        a1, b1, a2, b2 = (like_DF.new_zeros(num_experts, *shape) for shape in shapes)
        self.fc1_lora_a, self.fc1_lora_b = nn.Parameter(a1), nn.Parameter(b1)
        self.fc2_lora_a, self.fc2_lora_b = nn.Parameter(a2), nn.Parameter(b2)
        self.scale = scale

    @property
    def low_rank(self) -> LowRank:
        """The factors as the updates of fc1 (gate and up together) and fc2."""
        first, second = (self.fc1_lora_a, self.fc1_lora_b), (self.fc2_lora_a, self.fc2_lora_b)
        return LowRank(*first, *second, self.scale)


class LoraExpertsMLP(GatedMLP):
    """A gated MLP with LoRA experts; its three projections are those of ``base``."""

    def __init__(self, base: GatedMLP, mixture: LoraMixture, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.activation = base.activation
        self.gate_proj, self.up_proj = base.gate_proj, base.up_proj
        self.down_proj = base.down_proj
        like_DF = base.down_proj.weight
        self.gate = mixture.router(like_DF.shape[0]).to(like_DF.device)
        self.lora_experts = LoraExperts(mixture.num_experts, rank, scale, like_DF)
        self._is_weighted = mixture.weighting == "probability"

    def forward(
        self, x_TD: Tensor, adapters: AdapterRows | None = None, routing: Routing | None = None
    ) -> Tensor:
        """Return ``down(act(gate x) * up x)`` where each projection has the update of the choice.

        ``routing`` is that of :meth:`route`. Frozen weights and updates multiply apart:
        ``W x + w s B (A x)``.
        """
        assert routing is not None, "LoRA experts need the choice of their router"
        assert adapters is None, "a model that trains LoRA experts serves no adapters"
        groups = group_rows(routing.experts_TK[:, 0], len(self.lora_experts.fc1_lora_a))
        weights_T = routing.weights_TK[:, 0] if self._is_weighted else None
        low_rank = self.lora_experts.low_rank

        def added(x_TI: Tensor, update: Update) -> Tensor:
            return routed_low_rank(
                x_TI, update.a_SPI, update.b_SQP, groups, update.scale, weights_T
            )

        assert self.gate_proj is not None, "dense layers have a gate"
        h_TH = torch.cat([self.gate_proj(x_TD), self.up_proj(x_TD)], dim=-1)
        act_TF = gated(h_TH + added(x_TD, low_rank.first()), self.activation)
        out_TD: Tensor = self.down_proj(act_TF) + added(act_TF, low_rank.second())
        return out_TD
