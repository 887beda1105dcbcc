"""Mixtral: all layers sparse, softmax over the two experts chosen, perhaps a sliding window."""

from ..attention_config import AttentionConfig
from ..config import ModelConfig, MoEConfig
from ..expert_layouts import SeparateExperts
from ..router_config import TopK
from .family import Family
from .keys import (
    Values,
    num_layers,
    read_balance_loss,
    read_common,
    write_balance_loss,
)


def _read(values: Values) -> ModelConfig:
    k, window = values["num_experts_per_tok"], values.get("sliding_window")
    return ModelConfig(
        **read_common(values, theta=1e6),
        attention=AttentionConfig(
            qk_norm=None,
            window=window,
            window_layers=() if window is None else tuple(num_layers(values)),
        ),
        moe=MoEConfig(
            num_experts=values["num_local_experts"],
            d_expert=values["intermediate_size"],
            router=TopK(k=k, balance_loss=read_balance_loss(values, k, 0.001)),
        ),
    )


def _write(config: ModelConfig) -> Values:
    moe = config.moe
    assert moe is not None and isinstance(moe.router, TopK)
    return {
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.router.k,
        "intermediate_size": moe.d_expert,
        "sliding_window": config.attention.window if config.attention.window_layers else None,
        **write_balance_loss(moe.router),
    }


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read=_read,
    write=_write,
    experts=SeparateExperts("block_sparse_moe.experts", gate="w1", up="w3", down="w2"),
    renames=((".mlp.gate.", ".block_sparse_moe.gate."),),
)
