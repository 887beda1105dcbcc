"""Root-mean-square norm (Zhang and Sennrich 2019)."""

import torch
from torch import Tensor, nn

from ..kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in fp32 inside like Hugging Face's."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """Return ``weight * x / rms(x)``."""
        return rms_norm(x, self.weight, self.eps)
