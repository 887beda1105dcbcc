"""Our own family, for models that no other can express, with Qwen3-MoE's tensor names."""

from ...config.model import ModelConfig
from ..expert_layouts import SeparateExperts
from .family import Family
from .keys import Values


def _read(values: Values) -> ModelConfig:
    return ModelConfig.model_validate(values["moeyard"])


def _write(config: ModelConfig) -> Values:
    return {"moeyard": config.model_dump(mode="json")}


NATIVE = Family(
    model_type="moeyard",
    architecture="MoeyardForCausalLM",
    read=_read,
    write=_write,
    experts=SeparateExperts(),
    defaults={},
    activation=None,
    is_in_transformers=False,
)
