"""Dense families, read and written as sources of upcycling: Llama and Qwen3."""

from collections.abc import Callable
from typing import Literal

from ..attention_config import AttentionConfig
from ..config import ModelConfig
from ..expert_layouts import SeparateExperts
from .family import Family
from .keys import Values, check_only, layers_with, num_layers, read_common, write_layer_types


def _reader(qk_norm: Literal["head"] | None) -> Callable[[Values], ModelConfig]:
    def read(values: Values) -> ModelConfig:
        check_only(values, {"mlp_bias": False})
        has_bias = values.get("attention_bias", False)
        windows: tuple[int, ...] = ()
        if values.get("use_sliding_window"):
            first = values.get("max_window_layers", 28)
            usual = (
                "sliding_attention" if i >= first else "full_attention" for i in num_layers(values)
            )
            windows = layers_with("sliding_attention", values.get("layer_types") or usual)
        return ModelConfig(
            **read_common(values),
            d_ff=values["intermediate_size"],
            attention=AttentionConfig(
                qk_norm=qk_norm,
                qkv_bias=has_bias,
                o_bias=has_bias,
                window=values.get("sliding_window", 4096) if windows else None,
                window_layers=windows,
            ),
        )

    return read


def _write_llama(config: ModelConfig) -> Values:
    return {
        "intermediate_size": config.d_ff,
        "attention_bias": config.attention.qkv_bias,
        "mlp_bias": False,
    }


def _write_qwen3(config: ModelConfig) -> Values:
    return {
        "intermediate_size": config.d_ff,
        "attention_bias": config.attention.qkv_bias,
        "use_sliding_window": bool(config.attention.window_layers),
        "sliding_window": config.attention.window,
        "layer_types": write_layer_types(config),
    }


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=_reader(qk_norm=None),
    write=_write_llama,
    experts=SeparateExperts(),
    has_experts=False,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=_reader(qk_norm="head"),
    write=_write_qwen3,
    experts=SeparateExperts(),
    has_experts=False,
)
