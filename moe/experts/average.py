"""The mean of a layer's experts as one MLP, for layers whose experts stay near each other.

N rows, D model width, F expert width, H rows of fc1.
"""

import torch
from torch import Tensor, nn

from ...kernels.experts import Backend, expert_mlp
from ...kernels.values.activation import Activation, fc1_rows
from ...kernels.values.expert_weights import ExpertWeights


class AverageExpert(nn.Module):
    """One MLP whose buffers ``fc1 [H, D]``, ``fc2 [D, F]`` and biases are the experts' means."""

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        activation: Activation,
        bias: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.backend: Backend = backend
        d_hidden = fc1_rows(d_expert, activation)
        shapes: dict[str, tuple[int, ...]]
        shapes = {"fc1": (d_hidden, d_model), "fc2": (d_model, d_expert)}
        if bias:
            shapes |= {"fc1_bias": (d_hidden,), "fc2_bias": (d_model,)}
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def take(self, name: str, mean: Tensor) -> None:
        """Hold the mean of the experts' parameter ``name``, in its own type."""
        self.register_buffer(name, mean)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return the MLP's output, ``[N, D]``."""
        parts = {name: buffer.to(x_ND.dtype).unsqueeze(0) for name, buffer in self.named_buffers()}
        biases = (parts.get("fc1_bias"), parts.get("fc2_bias"))
        weights = ExpertWeights.of(
            (parts["fc1"], parts["fc2"], *biases), activation=self.activation
        )
        experts_N1 = torch.zeros(len(x_ND), 1, dtype=torch.int32, device=x_ND.device)
        return expert_mlp(
            x_ND,
            experts_N1,
            torch.ones_like(experts_N1, dtype=torch.float32),
            weights,
            self.backend,
        )
