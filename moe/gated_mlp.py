"""A dense MLP, mostly with a gate. T tokens, D model width."""

import torch
from torch import Tensor, nn

from ..kernels.gated import gated
from ..kernels.values.activation import UNGATED, Activation
from .adapters.rows import AdapterRows
from .linear import Linear


class GatedMLP(nn.Module):
    """A dense MLP: the decoder's dense layers and the shared experts.

    ``relu`` and ``gelu`` have no gate: it then has no ``gate_proj``.
    """

    def __init__(self, d_model: int, d_ff: int, activation: Activation = "swiglu") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate_proj = None if activation in UNGATED else Linear(d_model, d_ff)
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x_TD: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        """Return ``down(act(gate x) * up x)``, or ``down(act(up x))`` without a gate."""
        h: Tensor = self.up_proj(x_TD, adapters)
        if self.gate_proj is not None:
            h = torch.cat([self.gate_proj(x_TD, adapters), h], dim=-1)
        out: Tensor = self.down_proj(gated(h, self.activation), adapters)
        return out
