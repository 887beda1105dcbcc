"""Where kernels are launched, and where they cannot be.

Triton itself is imported only where :func:`why_not` has nothing to say, so that machines without it
import the rest.
"""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

MIN_CAPABILITY = (8, 0)
"""The first GPUs with bf16 tensor cores and asynchronous copies (Ampere)."""
HOPPER = 9


def why_not(device: torch.device) -> str | None:
    """Say in one sentence why the kernels cannot run on ``device``, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch's CUDA build."
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton then runs kernels on the CPU, slowly, to test them
    if device.type != "cuda":
        return "Triton needs a CUDA device."
    if torch.version.hip is not None:
        return "Triton's kernels here are written and checked for NVIDIA GPUs only."
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"Triton needs compute capability 8.0 or newer; this GPU has {found}."
    return None


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Launch on the device of x; Triton takes the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def is_hopper(x: Tensor) -> bool:
    """Say whether x is on a GPU whose tiles were measured apart."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == HOPPER
