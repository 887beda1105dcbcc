"""gpt-oss: biases everywhere, attention sinks, every other layer windowed, clamped SwiGLU."""

from ....kernels.values.activation import CLAMP, CLAMPED_SLOPE
from ...config.attention import AttentionConfig
from ...config.model import ModelConfig
from ...config.moe import MoEConfig
from ...routers.topk import TopK
from .balance_keys import read_balance_loss, write_balance_loss
from .family import Family
from .gpt_oss_experts import GptOssExperts
from .keys import (
    COMMON,
    Values,
    check_only,
    num_layers,
    read_common,
    read_windows,
    topk_moe,
    write_layer_types,
)

_WINDOW = 128
_CONSTANTS = {"swiglu_limit": CLAMP, "swiglu_alpha": CLAMPED_SLOPE}
_DEFAULTS = COMMON | {
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150_000.0,
    "sliding_window": _WINDOW,
    "layer_types": None,
    "attention_bias": True,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    **_CONSTANTS,
}
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""The family's meaning of ``rope_parameters: null``."""


def _read(values: Values) -> ModelConfig:
    check_only(values, _CONSTANTS)
    if values["rope_parameters"] is None:
        values = values | {"rope_parameters": _ROPE}
    every_other = (layer % 2 == 0 for layer in num_layers(values))
    window, windows = read_windows(values, values["sliding_window"], every_other)
    has_bias, k = values["attention_bias"], values["num_experts_per_tok"]
    check_only(values, {"experts_per_token": k})  # an older name, which transformers ignores
    return ModelConfig(
        **read_common(values),
        attention=AttentionConfig(
            qk_norm=None,
            qkv_bias=has_bias,
            o_bias=has_bias,
            sinks=True,
            window=window,
            window_layers=windows,
        ),
        moe=MoEConfig(
            num_experts=values["num_local_experts"],
            d_expert=values["intermediate_size"],
            activation="clamped_swiglu",
            expert_bias=True,
            # softmax of the chosen logits is softmax of all, renormalized
            router=TopK(k=k, logit_bias=True, **read_balance_loss(values, k)),
        ),
    )


def _write(config: ModelConfig) -> Values:
    moe, router = topk_moe(config)
    return {
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "experts_per_token": router.k,
        "intermediate_size": moe.d_expert,
        "attention_bias": config.attention.qkv_bias,
        "sliding_window": config.attention.window or _WINDOW,  # transformers requires a number
        "layer_types": write_layer_types(config),
        **_CONSTANTS,
        **write_balance_loss(config),
    }


GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    read=_read,
    write=_write,
    experts=GptOssExperts(),
    defaults=_DEFAULTS,
    aliases={"num_experts": "num_local_experts"},
    renames=((".mlp.gate.", ".mlp.router."),),
    own_quantization="mxfp4",
)
