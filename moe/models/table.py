"""The kinds of models by their configuration."""

from collections.abc import Iterator

import torch
from torch import nn

from ..config.encoder import EncoderConfig
from ..config.model import LayersConfig, decoder_config
from ..without_memory import without_memory
from .decoder import Decoder
from .decoder_layer import DecoderLayer
from .encoder import Encoder
from .encoder_layer import EncoderLayer
from .model import WHOLE, Model, ModelOptions


def build_model(config: LayersConfig, options: ModelOptions = WHOLE) -> Model:
    """Return the model of a configuration."""
    if isinstance(config, EncoderConfig):
        return Encoder(config, options)
    return Decoder(decoder_config(config), **options._asdict())


def layer_of(config: LayersConfig, index: int) -> nn.Module:
    """Return a layer of a model, without memory and without experts."""
    with without_memory():
        if isinstance(config, EncoderConfig):
            return EncoderLayer(config, index, ModelOptions(expert_ids=()))
        return DecoderLayer(decoder_config(config), index, expert_ids=())


def outside_layers(config: LayersConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor, without memory, of every parameter outside the layers."""
    if isinstance(config, EncoderConfig):
        with without_memory():
            ends = Encoder(config.model_copy(update={"num_layers": 0}))
        yield from ends.named_parameters()
        return
    decoder = decoder_config(config)
    embedding = torch.empty(decoder.vocabulary, decoder.d_model, device="meta")
    yield "embed_tokens.weight", embedding
    yield "norm.weight", embedding[0]
    if not decoder.tie_embeddings:
        yield "lm_head.weight", embedding
