"""Mixtral: all layers sparse, softmax over the two experts chosen, perhaps a sliding window."""

from ...config.attention import AttentionConfig
from ...config.model import ModelConfig
from ...config.moe import MoEConfig
from ...routers.topk import TopK
from ..expert_layouts import SeparateExperts
from .balance_keys import read_balance_loss, write_balance_loss
from .family import Family
from .keys import COMMON, Values, num_layers, read_common, topk_moe

_DEFAULTS = COMMON | {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def _read(values: Values) -> ModelConfig:
    k, window = values["num_experts_per_tok"], values["sliding_window"]
    return ModelConfig(
        **read_common(values),
        attention=AttentionConfig(
            qk_norm=None,
            window=window,
            window_layers=() if window is None else tuple(num_layers(values)),
        ),
        moe=MoEConfig(
            num_experts=values["num_local_experts"],
            d_expert=values["intermediate_size"],
            router=TopK(k=k, **read_balance_loss(values, k)),
        ),
    )


def _write(config: ModelConfig) -> Values:
    moe, router = topk_moe(config)
    return {
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "intermediate_size": moe.d_expert,
        "sliding_window": config.attention.window if config.attention.window_layers else None,
        **write_balance_loss(config),
    }


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read=_read,
    write=_write,
    experts=SeparateExperts("block_sparse_moe.experts", gate="w1", up="w3", down="w2"),
    defaults=_DEFAULTS,
    aliases={"num_experts": "num_local_experts"},
    renames=((".mlp.gate.", ".block_sparse_moe.gate."),),
)
