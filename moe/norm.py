"""Root-mean-square norm (Zhang and Sennrich 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.cpu.norm import rms_norm as cpp_rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in fp32 inside like Hugging Face's."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return ``weight * x / rms(x)``."""
        if not torch.is_grad_enabled():
            normed = cpp_rms_norm(x, self.weight, self.eps)
            if normed is not None:
                return normed
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype)
