"""The C++ kernels as a loaded library, or the reason why there is none.

``MOEYARD_CPU_KERNELS`` limits them: ``off``, or the highest instruction set they may use
(``portable``, ``avx2``, ``avx512``, ``avx512_bf16``).
"""

import ctypes
import logging
import os
import threading
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from ...cpp_libraries import BuildError
from .build import VARIANTS, built_library
from .structures import misfit

VARIABLE = "MOEYARD_CPU_KERNELS"
TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""``ElementType`` of arguments.h."""

log = logging.getLogger(__name__)


class Library(NamedTuple):
    """The result of loading the kernels."""

    functions: ctypes.CDLL | None
    state: str
    """The instruction set in use, or why there is none."""
    is_wrong: bool = False
    """Whether the kernels exist but compute wrong results."""


_loaded: Library | None = None
_loading = threading.Lock()


def load() -> Library:
    """Load the kernels, building them first if needed; the result is kept for the process.

    trust.py checks whether they compute correct results.
    """
    global _loaded
    if _loaded is None:
        with _loading:
            if _loaded is None:
                _loaded = _open()
    return _loaded


def _open() -> Library:
    limit = os.environ.get(VARIABLE) or None
    if limit == "off":
        return Library(None, f"switched off by {VARIABLE}=off")
    if limit is not None and limit not in VARIANTS:
        return without(f"{VARIABLE} is {limit!r}; use off or one of {', '.join(VARIANTS)}")
    try:
        functions = ctypes.CDLL(str(built_library()))
    except (BuildError, OSError) as error:
        return without(str(error))
    problem = misfit(functions)
    if problem is not None:
        return without(f"{problem}; make structures.py like arguments.h")._replace(is_wrong=True)
    choose = functions.moeyard_choose
    choose.argtypes, choose.restype = [ctypes.c_char_p], ctypes.c_char_p
    functions.moeyard_experts.restype = ctypes.c_int64
    functions.moeyard_quantized_experts.restype = ctypes.c_int64
    functions.moeyard_group_sparse_experts.restype = ctypes.c_int64
    functions.moeyard_two_of_four_experts.restype = ctypes.c_int64
    functions.moeyard_channel_experts.restype = ctypes.c_int64
    functions.moeyard_live_channels.restype = ctypes.c_int64
    functions.moeyard_expert_forward.restype = ctypes.c_int64
    name = choose(None if limit is None else limit.encode()).decode()
    return Library(functions, name)


def without(reason: str) -> Library:
    """Warn and return a result without kernels."""
    log.warning("the CPU kernels are not used, torch's are: %s", reason)
    return Library(None, reason)


def functions_for(*tensors: torch.Tensor, is_backward_ours: bool = False) -> ctypes.CDLL | None:
    """Return the kernels if they can compute with these tensors: one type, dense.

    Returns None while autograd records, unless the caller computes the backward.
    """
    first = tensors[0]
    if first.dtype not in TYPES or (torch.is_grad_enabled() and not is_backward_ours):
        return None
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return None  # tensor subclasses carry more than their memory
    for tensor in tensors:
        if tensor.dtype != first.dtype or not tensor.is_cpu or not tensor.is_contiguous():
            return None
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return None  # fake, distributed and other tensors without plain memory
    return load().functions


def address(tensor: torch.Tensor | None) -> int | None:
    """Return a tensor's address; None stays None, the null pointer."""
    return None if tensor is None else tensor.data_ptr()


def empty_fp32(*shape: int) -> torch.Tensor:
    """Return memory for the kernels' results, whatever torch's default type and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")
