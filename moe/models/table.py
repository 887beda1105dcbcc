"""The kinds of models by their configuration. A new kind is a line here and in config/kinds.py."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..config.encoder import EncoderConfig
from ..config.model import LayersConfig, ModelConfig
from ..config.super_resolution import SuperResolutionConfig
from ..without_memory import without_memory
from .decoder import Decoder
from .decoder_layer import DecoderLayer
from .encoder import Encoder
from .encoder_layer import EncoderLayer
from .model import Model
from .options import WHOLE, ModelOptions
from .super_resolution import SuperResolution
from .super_resolution_layer import SuperResolutionLayer


class ModelKind(NamedTuple):
    """How a kind of model is built."""

    build: Callable[[Any, ModelOptions], Model]
    """Return the model of a configuration, which may have 0 layers."""
    layer: Callable[[Any, int, ModelOptions], nn.Module]
    """Return one layer, by its index."""


KINDS: dict[type[LayersConfig], ModelKind] = {
    ModelConfig: ModelKind(
        lambda config, options: Decoder(config, **options._asdict()),
        DecoderLayer,
    ),
    EncoderConfig: ModelKind(Encoder, EncoderLayer),
    SuperResolutionConfig: ModelKind(SuperResolution, SuperResolutionLayer),
}
"""By the class of the configuration."""


def build_model(config: LayersConfig, options: ModelOptions = WHOLE) -> Model:
    """Return the model of a configuration."""
    return KINDS[type(config)].build(config, options)


def layer_of(config: LayersConfig, index: int) -> nn.Module:
    """Return a layer of a model, without memory and without experts."""
    with without_memory():
        return KINDS[type(config)].layer(config, index, ModelOptions(expert_ids=()))


def outside_layers(config: LayersConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor, without memory, of every parameter outside the layers."""
    with without_memory():
        ends = build_model(config.model_copy(update={"num_layers": 0}))
    yield from ends.named_parameters()
