"""Dense families, read and written as sources of upcycling: Llama and Qwen3."""

from ...config.attention import AttentionConfig
from ...config.model import ModelConfig
from ..expert_layouts import SeparateExperts
from .family import Family
from .keys import (
    COMMON,
    Values,
    check_only,
    num_layers,
    read_common,
    read_windows,
    write_layer_types,
)

_LLAMA_DEFAULTS = COMMON | {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN3_DEFAULTS = COMMON | {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32_768,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def _read_llama(values: Values) -> ModelConfig:
    return _read(values, AttentionConfig(qk_norm=None, **_biases(values)))


def _read_qwen3(values: Values) -> ModelConfig:
    width = values["sliding_window"] if values["use_sliding_window"] else None
    first = values["max_window_layers"]
    usual = (width is not None and layer >= first for layer in num_layers(values))
    window, windows = read_windows(values, width, usual)
    attention = AttentionConfig(window=window, window_layers=windows, **_biases(values))
    return _read(values, attention)


def _read(values: Values, attention: AttentionConfig) -> ModelConfig:
    check_only(values, {"mlp_bias": False})
    return ModelConfig(**read_common(values), d_ff=values["intermediate_size"], attention=attention)


def _biases(values: Values) -> Values:
    return {"qkv_bias": values["attention_bias"], "o_bias": values["attention_bias"]}


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
    read=_read_llama,
    write=_write_llama,
    experts=SeparateExperts(),
    defaults=_LLAMA_DEFAULTS,
    has_experts=False,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=_read_qwen3,
    write=_write_qwen3,
    experts=SeparateExperts(),
    defaults=_QWEN3_DEFAULTS,
    may_be_null=("num_key_value_heads", "sliding_window"),
    has_experts=False,
)
