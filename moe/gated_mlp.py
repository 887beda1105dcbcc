"""A dense MLP, mostly with a gate. T tokens, D model width."""

import torch
from torch import Tensor, nn

from ..kernels.gated import gated, row_sigmoid
from ..kernels.values.activation import UNGATED, Activation
from .adapters.rows import AdapterRows
from .linear import Linear
from .routers.router import Router
from .routers.routing import RouterInput, Routing


class GatedMLP(nn.Module):
    """A dense MLP: the decoder's dense layers and the shared experts.

    ``relu`` and ``gelu`` have no gate: it then has no ``gate_proj``.
    """

    gate: Router | None
    """Chooses among LoRA experts (models/lora_experts.py); None without any."""

    def __init__(self, d_model: int, d_ff: int, activation: Activation = "swiglu") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate = None
        self.gate_proj = None if activation in UNGATED else Linear(d_model, d_ff)
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def route(self, router_input: RouterInput) -> Routing | None:
        """Return the choice of LoRA experts for rows; None without any."""
        return None if self.gate is None else self.gate.route(router_input)

    def forward(
        self, x_TD: Tensor, adapters: AdapterRows | None = None, routing: Routing | None = None
    ) -> Tensor:
        """Return ``down(act(gate x) * up x)``, or ``down(act(up x))`` without a gate.

        ``routing`` is that of :meth:`route`.
        """
        h_TH: Tensor = self.up_proj(x_TD, adapters)
        if self.gate_proj is not None:
            h_TH = torch.cat([self.gate_proj(x_TD, adapters), h_TH], dim=-1)
        chosen = [] if adapters is None else adapters.choose(self, x_TD)
        for rows_n, update in chosen:
            h_TH = h_TH.index_add(0, rows_n, update.first(x_TD.index_select(0, rows_n)))
        act_TF = gated(h_TH, self.activation)
        out_TD: Tensor = self.down_proj(act_TF, adapters)
        for rows_n, update in chosen:
            out_TD = out_TD.index_add(0, rows_n, update.second(act_TF.index_select(0, rows_n)))
        return out_TD


def run_shared(
    expert: nn.Module, gate: nn.Module | None, adapters: AdapterRows | None, x_TD: Tensor
) -> Tensor:
    """Return what a shared expert, perhaps behind a gate, adds to every token."""
    y_TD: Tensor = expert(x_TD, adapters)
    return y_TD if gate is None else row_sigmoid(gate(x_TD, adapters)) * y_TD
