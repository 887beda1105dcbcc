"""The kinds of models that ``model.kind`` names."""

from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field, TypeAdapter

from .encoder import EncoderConfig
from .encoder_decoder import EncoderDecoderConfig
from .model import LayersConfig, ModelConfig
from .moirai import MoiraiConfig
from .super_resolution import SuperResolutionConfig
from .time_moe import TimeMoeConfig
from .vit import ViTConfig


def _with_kind(values: Any) -> Any:
    """Fill in the kind of a section that names none: that of older releases."""
    if isinstance(values, dict) and "kind" not in values:
        return {"kind": "decoder", **values}
    return values


AnyModel = (
    ModelConfig
    | EncoderConfig
    | MoiraiConfig
    | TimeMoeConfig
    | EncoderDecoderConfig
    | ViTConfig
    | SuperResolutionConfig
)
ModelSection = Annotated[AnyModel, Field(discriminator="kind"), BeforeValidator(_with_kind)]
KINDS: tuple[str, ...] = tuple(kind.model_fields["kind"].default for kind in get_args(AnyModel))
"""Their names."""
_ADAPTER: TypeAdapter[AnyModel] = TypeAdapter(ModelSection)


def kind_of(values: Any) -> type[LayersConfig] | None:
    """Return the kind of a section, which may be wrong in other ways; None for no known kind."""
    name = values.get("kind", "decoder") if isinstance(values, dict) else None
    kinds: tuple[type[LayersConfig], ...] = get_args(AnyModel)
    return next((kind for kind in kinds if kind.model_fields["kind"].default == name), None)


def read_model(values: Any) -> AnyModel:
    """Return the configuration in stored values; raise pydantic's ``ValidationError``."""
    return _ADAPTER.validate_python(values)
