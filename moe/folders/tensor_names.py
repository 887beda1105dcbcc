"""Which tensors outside the experts a configuration asks for, with the decoder's names."""

from collections.abc import Iterator

import torch
from torch import nn

from ..config.model import ModelConfig
from ..models.decoder_layer import DecoderLayer
from ..without_memory import without_memory

ROUTER = ".mlp.gate."
"""The path from the layer to a router's tensor."""

Named = Iterator[tuple[str, torch.Tensor]]


def dense_tensors(config: ModelConfig) -> Named:
    """Yield name and tensor, without memory, of every parameter and buffer but the experts'.

    Layer by layer, so that a caller that stops early has built only a few.
    """
    embedding = torch.empty(config.vocabulary, config.d_model, device="meta")
    yield "embed_tokens.weight", embedding
    yield "norm.weight", embedding[0]
    if not config.tie_embeddings:
        yield "lm_head.weight", embedding
    for index in range(config.num_layers):
        with without_memory():
            layer = DecoderLayer(config, index, expert_ids=())
        for name, tensor in _outside_experts(layer):
            yield f"layers.{index}.{name}", tensor


def is_router(parameter: str) -> bool:
    """Say whether a tensor is a router's; routers keep their type when others are narrowed."""
    return ROUTER in parameter


def _outside_experts(layer: nn.Module) -> Named:
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if not name.startswith("mlp.experts."):
            yield name, tensor
