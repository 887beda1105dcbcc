"""On which devices the kernels can run.

Triton is imported only if :func:`why_not` returns None, so that machines without Triton can import
the rest.
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
    """Return one sentence on why the kernels cannot run on ``device``, or None if they can."""
    if torch.compiler.is_compiling():
        return None  # it cannot follow how we look around
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
    """Make x's device current, because Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def is_hopper(x: Tensor) -> bool:
    """Say whether x is on a Hopper GPU, which has its own measured tiles."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == HOPPER
