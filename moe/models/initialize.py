"""Initial weights as a pure function of (seed, parameter name, expert), independent of sharding."""

import hashlib
import math
from collections.abc import Container

import torch
from torch import Tensor

from ..exchange import refill_averages
from ..experts.resident import Experts
from ..linear import FromZero
from ..routers.router import Router
from .model import Model


def initialize(model: Model, seed: int, only: Container[str] | None = None) -> None:
    """Fill every parameter of ``model``, or those whose names are in ``only``.

    Matrices are normal with std ``fan_in**-0.5``, output projections scaled by
    ``(2 * num_layers)**-0.5`` (GPT-2), embeddings and the head with std 0.02, norms and
    scalars one, biases, attention sinks and :class:`.FromZero` zero. Routers may say otherwise for
    their own. Draws are made in fp32 and cast, so that all precisions start from the same numbers.
    """
    residual = (2 * model.config.num_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if only is not None and name not in only:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        first = _of_router(model, name, seed)
        if first is not None:
            parameter.data.copy_(first)
        elif name.endswith(("bias", "sinks")) or isinstance(owner, FromZero):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim <= 1:
            torch.nn.init.ones_(parameter)
        elif isinstance(owner, Experts):
            scale = residual if name.endswith("fc2") else 1.0
            for slot, expert in enumerate(owner.expert_ids):
                std = scale * parameter.shape[-1] ** -0.5
                _fill(parameter.data[slot], std, f"{seed}/{name}/{expert}")
        elif name.startswith(("embed_", "lm_head", "classifier")):
            _fill(parameter.data, 0.02, f"{seed}/{name}")
        else:
            scale = residual if "o_proj" in name or "down_proj" in name else 1.0
            _fill(parameter.data, scale / math.sqrt(parameter.shape[-1]), f"{seed}/{name}")
    if only is None:
        for router in model.routers():
            router.experts_changed()
        refill_averages(layer for _, layer in model.moe_layers())


def _of_router(model: Model, name: str, seed: int) -> Tensor | None:
    """Return what a router wants its parameter to begin with; None for other parameters."""
    owner, part, rest = name.partition(".gate.")
    router = model.get_submodule(f"{owner}.gate") if part else None
    if not isinstance(router, Router):
        return None
    return router.initialize(rest, generator_of(f"{seed}/{name}"))


def generator_of(key: str) -> torch.Generator:
    """Return a generator whose numbers depend only on ``key``."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def _fill(target: Tensor, std: float, key: str) -> None:
    drawn = torch.randn(target.shape, generator=generator_of(key), dtype=torch.float32)
    target.copy_(drawn * std)
