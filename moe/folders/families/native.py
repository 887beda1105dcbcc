"""Our own family, for models that no other can express.

Decoders have Qwen3-MoE's tensor names. Encoders have ours.
"""

from typing import Any

from ...config.encoder import EncoderConfig
from ...config.kinds import read_model
from ...config.model import LayersConfig
from ..expert_layouts import SeparateExperts
from .encoder_keys import write_encoder
from .family import Family
from .keys import Values, write_common


def _read(values: Values) -> LayersConfig:
    return read_model(values["moeyard"])


def _write(config: LayersConfig) -> Values:
    own: Values = {"moeyard": config.model_dump(mode="json")}
    if isinstance(config, EncoderConfig):
        own["architectures"] = ["MoeyardForSequenceClassification"]
    return own


def _write_common(config: Any) -> Values:
    return write_encoder(config) if isinstance(config, EncoderConfig) else write_common(config)


NATIVE = Family(
    model_type="moeyard",
    architecture="MoeyardForCausalLM",
    read=_read,
    write=_write,
    experts=SeparateExperts(),
    defaults={},
    activation=None,
    is_in_transformers=False,
    kinds=("decoder", "encoder"),
    write_common=_write_common,
)
