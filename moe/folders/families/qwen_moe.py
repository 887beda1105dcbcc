"""Qwen2-MoE (a gated shared expert, biases on q, k and v) and Qwen3-MoE (norms of q and k)."""

from typing import Any

from ....errors import ModelFileError
from ...config.attention import AttentionConfig
from ...config.model import ModelConfig
from ...config.moe import MoEConfig
from ...routers.topk import TopK
from ..expert_layouts import SeparateExperts
from .balance_keys import read_balance_loss, write_balance_loss
from .family import Family
from .keys import COMMON, Values, num_layers, read_common, read_windows, topk_moe, write_layer_types

_DEFAULTS = COMMON | {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
_QWEN2_DEFAULTS = _DEFAULTS | {
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "qkv_bias": True,
    "max_window_layers": 28,
    "layer_types": None,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
_QWEN3_DEFAULTS = _DEFAULTS | {
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def read_dense_layers(values: Values) -> tuple[int, ...]:
    """Return the layers without experts: ``mlp_only_layers``, and all but every n-th."""
    step, only = values["decoder_sparse_step"], values["mlp_only_layers"] or []
    if type(step) is not int or step < 1:
        raise ModelFileError(f"config.json has decoder_sparse_step = {step!r}; use 1 or more.")
    layers = num_layers(values)
    return tuple(layer for layer in layers if layer in only or (layer + 1) % step)


def _read_moe(values: Values, **more: Any) -> MoEConfig:
    k = values["num_experts_per_tok"]
    return MoEConfig(
        num_experts=values["num_experts"],
        d_expert=values["moe_intermediate_size"],
        router=TopK(
            k=k,
            renormalize=values["norm_topk_prob"],
            **read_balance_loss(values, k),
        ),
        **more,
    )


def _write_moe(config: ModelConfig) -> Values:
    moe, router = topk_moe(config)
    return {
        "intermediate_size": config.d_ff or config.d_model,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "moe_intermediate_size": moe.d_expert,
        "norm_topk_prob": router.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(set(config.dense_layers)),
        "use_sliding_window": bool(config.attention.window_layers),
        "sliding_window": config.attention.window,
        **write_balance_loss(config),
    }


def _read_qwen2(values: Values) -> ModelConfig:
    is_used, last = values["use_sliding_window"], values["max_window_layers"]
    usual = (is_used and layer % 2 == 0 and layer < last for layer in num_layers(values))
    window, windows = read_windows(values, values["sliding_window"] if is_used else None, usual)
    return ModelConfig(
        **read_common(values),
        d_ff=values["intermediate_size"],
        dense_layers=read_dense_layers(values),
        attention=AttentionConfig(
            qk_norm=None,
            qkv_bias=values["qkv_bias"],
            window=window,
            window_layers=windows,
        ),
        moe=_read_moe(values, d_shared=values["shared_expert_intermediate_size"], shared_gate=True),
    )


def _write_qwen2(config: ModelConfig) -> Values:
    assert config.moe is not None
    return _write_moe(config) | {
        "shared_expert_intermediate_size": config.moe.d_shared,
        "qkv_bias": config.attention.qkv_bias,
        "layer_types": write_layer_types(config),
    }


def _read_qwen3(values: Values) -> ModelConfig:
    has_bias = values["attention_bias"]
    window = values["sliding_window"] if values["use_sliding_window"] else None
    return ModelConfig(
        **read_common(values),
        d_ff=values["intermediate_size"],
        dense_layers=read_dense_layers(values),
        attention=AttentionConfig(
            qkv_bias=has_bias,
            o_bias=has_bias,
            window=window,
            window_layers=() if window is None else tuple(num_layers(values)),
        ),
        moe=_read_moe(values),
    )


def _write_qwen3(config: ModelConfig) -> Values:
    return _write_moe(config) | {"attention_bias": config.attention.qkv_bias}


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    read=_read_qwen2,
    write=_write_qwen2,
    experts=SeparateExperts(),
    defaults=_QWEN2_DEFAULTS,
    may_be_null=("sliding_window",),
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=_read_qwen3,
    write=_write_qwen3,
    experts=SeparateExperts(),
    defaults=_QWEN3_DEFAULTS,
    may_be_null=("sliding_window",),
    aliases={"num_local_experts": "num_experts"},
)
