"""A dense MLP with a gate. T tokens, D model width."""

import torch
from torch import Tensor, nn

from ..kernels.gated import gated
from ..kernels.values.activation import Activation
from .adapters.rows import AdapterRows
from .linear import Linear


class GatedMLP(nn.Module):
    """A dense gated MLP: the decoder's dense layers and the shared experts."""

    def __init__(self, d_model: int, d_ff: int, activation: Activation = "swiglu") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate_proj = Linear(d_model, d_ff)
        self.up_proj = Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)

    def forward(self, x_TD: Tensor, adapters: AdapterRows | None = None) -> Tensor:
        """Return ``down(act(gate x) * up x)``."""
        h = torch.cat([self.gate_proj(x_TD, adapters), self.up_proj(x_TD, adapters)], dim=-1)
        out: Tensor = self.down_proj(gated(h, self.activation), adapters)
        return out
