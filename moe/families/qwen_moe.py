"""Qwen2-MoE (a gated shared expert, biases on q, k and v) and Qwen3-MoE (norms of q and k)."""

from typing import Any

from ...errors import ModelFileError
from ..attention_config import AttentionConfig
from ..config import ModelConfig, MoEConfig
from ..expert_layouts import SeparateExperts
from ..router_config import TopK
from .family import Family
from .keys import (
    Values,
    layers_with,
    num_layers,
    read_balance_loss,
    read_common,
    write_balance_loss,
    write_layer_types,
)


def read_dense_layers(values: Values) -> tuple[int, ...]:
    """Return the layers without experts: ``mlp_only_layers``, and all but every n-th."""
    step, only = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers") or []
    if type(step) is not int or step < 1:
        raise ModelFileError(f"config.json has decoder_sparse_step = {step!r}; use 1 or more.")
    layers = num_layers(values)
    return tuple(layer for layer in layers if layer in only or (layer + 1) % step)


def _read_moe(values: Values, **more: Any) -> MoEConfig:
    k = values["num_experts_per_tok"]
    return MoEConfig(
        # transformers 4 writes num_experts, 5 also num_local_experts
        num_experts=values.get("num_local_experts") or values["num_experts"],
        d_expert=values["moe_intermediate_size"],
        router=TopK(
            k=k,
            renormalize=values.get("norm_topk_prob", False),
            balance_loss=read_balance_loss(values, k, 0.001),
        ),
        **more,
    )


def _write_moe(config: ModelConfig) -> Values:
    moe = config.moe
    assert moe is not None and isinstance(moe.router, TopK)
    return {
        "intermediate_size": config.d_ff or config.d_model,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.router.k,
        "moe_intermediate_size": moe.d_expert,
        "norm_topk_prob": moe.router.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(set(config.dense_layers)),
        "use_sliding_window": bool(config.attention.window_layers),
        "sliding_window": config.attention.window,
        **write_balance_loss(moe.router),
    }


def _read_qwen2(values: Values) -> ModelConfig:
    windows: tuple[int, ...] = ()
    if values.get("use_sliding_window"):
        last = values.get("max_window_layers", 28)
        usual = (
            "full_attention" if i % 2 or i >= last else "sliding_attention"
            for i in num_layers(values)
        )
        windows = layers_with("sliding_attention", values.get("layer_types") or usual)
    return ModelConfig(
        **read_common(values),
        d_ff=values["intermediate_size"],
        dense_layers=read_dense_layers(values),
        attention=AttentionConfig(
            qk_norm=None,
            qkv_bias=values.get("qkv_bias", True),
            window=values.get("sliding_window", 4096) if windows else None,
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
    has_bias = values.get("attention_bias", False)
    window = values.get("sliding_window", 4096) if values.get("use_sliding_window") else None
    return ModelConfig(
        **read_common(values),
        d_ff=values.get("intermediate_size"),
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
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=_read_qwen3,
    write=_write_qwen3,
    experts=SeparateExperts(),
)
