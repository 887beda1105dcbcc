"""OLMoE: all layers sparse, q and k normed over all heads at once, perhaps clipped."""

from ..attention_config import AttentionConfig
from ..config import ModelConfig, MoEConfig
from ..expert_layouts import SeparateExperts
from ..router_config import TopK
from .family import Family
from .keys import Values, read_balance_loss, read_common, write_balance_loss


def _read(values: Values) -> ModelConfig:
    k, has_bias = values["num_experts_per_tok"], values.get("attention_bias", False)
    return ModelConfig(
        **read_common({"rms_norm_eps": 1e-5} | values),
        attention=AttentionConfig(
            qk_norm="projection",
            qkv_bias=has_bias,
            o_bias=has_bias,
            clip_qkv=values.get("clip_qkv"),
        ),
        moe=MoEConfig(
            num_experts=values["num_experts"],
            d_expert=values["intermediate_size"],
            router=TopK(
                k=k,
                renormalize=values.get("norm_topk_prob", False),
                balance_loss=read_balance_loss(values, k, 0.01),
            ),
        ),
    )


def _write(config: ModelConfig) -> Values:
    moe = config.moe
    assert moe is not None and isinstance(moe.router, TopK)
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.router.k,
        "intermediate_size": moe.d_expert,
        "norm_topk_prob": moe.router.renormalize,
        "attention_bias": config.attention.qkv_bias,
        "clip_qkv": config.attention.clip_qkv,
        **write_balance_loss(moe.router),
    }


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    read=_read,
    write=_write,
    experts=SeparateExperts(),
)
