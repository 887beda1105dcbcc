"""Which tensors have which type."""

from collections.abc import Set

import torch
from torch import Tensor

from ..dtypes import torch_dtype
from ..moe.models.model import Model
from ..moe.routers.router import Router


def apply_precision(
    model: Model, precision: str, sharded: Set[str] = frozenset()
) -> dict[str, Tensor]:
    """Cast an fp32 model in place and return fp32 masters of the parameters this narrowed.

    Under bf16 the routers stay in fp32. So do the trained ``sharded`` parameters: they are masters
    themselves, and FSDP casts them when it gathers them, DeepSpeed when it gets them. Frozen
    parameters need no master. Main gradients are always fp32 (parallel/dense/gradients.py).
    """
    dtype = torch_dtype(precision)
    routers = {p for m in model.modules() if isinstance(m, Router) for p in m.parameters()}
    masters = {}
    for name, parameter in model.named_parameters():
        trains = parameter.requires_grad
        is_master = parameter in routers or (trains and name in sharded)
        if dtype == torch.bfloat16 and is_master:
            continue
        if dtype == torch.bfloat16 and trains:
            masters[name] = parameter.detach().clone()
        parameter.data = parameter.data.to(dtype)
    return masters
