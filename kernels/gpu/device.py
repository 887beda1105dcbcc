"""Where kernels are launched."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Launch on the device of x; Triton takes the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
