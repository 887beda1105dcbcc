"""gpt-oss: biases everywhere, attention sinks, every other layer windowed, clamped SwiGLU."""

from ...kernels.activation import CLAMP, CLAMPED_SLOPE
from ..attention_config import AttentionConfig
from ..config import ModelConfig, MoEConfig
from ..router_config import TopK
from .family import Family
from .gpt_oss_experts import GptOssExperts
from .keys import (
    Values,
    check_only,
    layers_with,
    num_layers,
    read_balance_loss,
    read_common,
    write_balance_loss,
    write_layer_types,
)

_WINDOW = 128
_CONSTANTS = {"swiglu_limit": CLAMP, "swiglu_alpha": CLAMPED_SLOPE}


def _read(values: Values) -> ModelConfig:
    check_only(values, _CONSTANTS)
    usual = ("full_attention" if i % 2 else "sliding_attention" for i in num_layers(values))
    windows = layers_with("sliding_attention", values.get("layer_types") or usual)
    has_bias = values.get("attention_bias", True)
    k = values.get("num_experts_per_tok") or values["experts_per_token"]
    return ModelConfig(
        **read_common({"rms_norm_eps": 1e-5, "head_dim": 64} | values, theta=150_000.0),
        attention=AttentionConfig(
            qk_norm=None,
            qkv_bias=has_bias,
            o_bias=has_bias,
            sinks=True,
            window=values.get("sliding_window", _WINDOW) if windows else None,
            window_layers=windows,
        ),
        moe=MoEConfig(
            num_experts=values["num_local_experts"],
            d_expert=values["intermediate_size"],
            activation="clamped_swiglu",
            expert_bias=True,
            # softmax of the chosen logits is softmax of all, renormalized
            router=TopK(k=k, logit_bias=True, balance_loss=read_balance_loss(values, k, 0.001)),
        ),
    )


def _write(config: ModelConfig) -> Values:
    moe = config.moe
    assert moe is not None and isinstance(moe.router, TopK)
    return {
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.router.k,
        "experts_per_token": moe.router.k,
        "intermediate_size": moe.d_expert,
        "attention_bias": config.attention.qkv_bias,
        "sliding_window": config.attention.window or _WINDOW,  # transformers wants a number
        "layer_types": write_layer_types(config),
        **_CONSTANTS,
        **write_balance_loss(moe.router),
    }


GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    read=_read,
    write=_write,
    experts=GptOssExperts(),
    renames=((".mlp.gate.", ".mlp.router."),),
    own_quantization="mxfp4",
)
