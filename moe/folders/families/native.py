"""Our own family, for models that no other can express.

Decoders have Qwen3-MoE's tensor names. Other models have ours.
"""

from typing import Any

from ...config.encoder import EncoderConfig
from ...config.kinds import KINDS, read_model
from ...config.model import LayersConfig, ModelConfig
from ..channel_layout import NATIVE_EXPERTS
from .encoder_keys import write_encoder
from .family import Family
from .keys import Values, write_common


def _read(values: Values) -> LayersConfig:
    return read_model(values["moeyard"])


def _write(config: LayersConfig) -> Values:
    own: Values = {"moeyard": config.model_dump(mode="json")}
    if isinstance(config, EncoderConfig):
        own["architectures"] = ["MoeyardForSequenceClassification"]
    elif not isinstance(config, ModelConfig):
        own["architectures"] = ["MoeyardModel"]
    return own


def _write_common(config: Any) -> Values:
    if isinstance(config, EncoderConfig):
        return write_encoder(config)
    return write_common(config) if isinstance(config, ModelConfig) else {}


NATIVE = Family(
    model_type="moeyard",
    architecture="MoeyardForCausalLM",
    read=_read,
    write=_write,
    experts=NATIVE_EXPERTS,
    defaults={},
    activation=None,
    is_in_transformers=False,
    kinds=KINDS,
    write_common=_write_common,
)
