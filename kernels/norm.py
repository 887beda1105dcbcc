"""Root-mean-square norm (Zhang and Sennrich 2019). H width of a row."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu.norm import rms_norm as cpp_rms_norm
from .trust import may_use_cpp


def rms_norm(x: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """Return ``weight * x / rms(x)`` over the last dimension, computed at least in fp32."""
    if not torch.is_grad_enabled() and may_use_cpp(x):
        # A part of wider rows is contiguous if it is one row alone, which must not matter.
        normed = cpp_rms_norm(x.contiguous(), weight_H, epsilon)
        if normed is not None:
            return normed
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight_H * F.rms_norm(wide, wide.shape[-1:], eps=epsilon).to(x.dtype)
