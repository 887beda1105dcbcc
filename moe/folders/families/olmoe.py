"""OLMoE: all layers sparse, q and k normed over all heads together, perhaps clipped."""

from ...config.attention import AttentionConfig
from ...config.model import ModelConfig
from ...config.moe import MoEConfig
from ...routers.topk import TopK
from ..expert_layouts import SeparateExperts
from .balance_keys import read_balance_loss, write_balance_loss
from .family import Family
from .keys import COMMON, Values, read_common, topk_moe

_DEFAULTS = COMMON | {
    "vocab_size": 50_304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": None,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "clip_qkv": None,
    "num_experts_per_tok": 8,
    "num_experts": 64,
    "norm_topk_prob": False,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.01,
}


def _read(values: Values) -> ModelConfig:
    k, has_bias = values["num_experts_per_tok"], values["attention_bias"]
    return ModelConfig(
        **read_common(values),
        attention=AttentionConfig(
            qk_norm="projection",
            qkv_bias=has_bias,
            o_bias=has_bias,
            clip_qkv=values["clip_qkv"],
        ),
        moe=MoEConfig(
            num_experts=values["num_experts"],
            d_expert=values["intermediate_size"],
            router=TopK(
                k=k,
                renormalize=values["norm_topk_prob"],
                **read_balance_loss(values, k),
            ),
        ),
    )


def _write(config: ModelConfig) -> Values:
    moe, router = topk_moe(config)
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "intermediate_size": moe.d_expert,
        "norm_topk_prob": router.renormalize,
        "attention_bias": config.attention.qkv_bias,
        "clip_qkv": config.attention.clip_qkv,
        **write_balance_loss(config),
    }


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    read=_read,
    write=_write,
    experts=SeparateExperts(),
    defaults=_DEFAULTS,
    aliases={"num_local_experts": "num_experts"},
)
