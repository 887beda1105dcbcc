"""Which tensors outside the experts a configuration asks for, with the model's names."""

from collections.abc import Iterator

import torch
from torch import nn

from ..config.model import LayersConfig
from ..models.table import layer_of, outside_layers

ROUTER = ".mlp.gate."
"""The path from the layer to a router's tensor."""

Named = Iterator[tuple[str, torch.Tensor]]


def dense_tensors(config: LayersConfig) -> Named:
    """Yield name and tensor, without memory, of every parameter and buffer but the experts'.

    Layer by layer, so that a caller that stops early has built only a few.
    """
    yield from outside_layers(config)
    for index in range(config.num_layers):
        for name, tensor in _outside_experts(layer_of(config, index)):
            yield f"layers.{index}.{name}", tensor


def is_router(parameter: str) -> bool:
    """Say whether a tensor is a router's; routers keep their type when others are narrowed."""
    return ROUTER in parameter


def _outside_experts(layer: nn.Module) -> Named:
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if not name.startswith("mlp.experts."):
            yield name, tensor
