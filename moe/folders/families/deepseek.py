"""DeepSeek-V2 (softmax, groups ranked by their best) and V3 (sigmoid, balancing bias)."""

from ....errors import ModelFileError
from ...config.attention import AttentionConfig, LatentConfig
from ...config.model import ModelConfig
from ...config.moe import MoEConfig
from ...routers.topk import TopK
from ..expert_layouts import SeparateExperts
from .family import Family
from .keys import COMMON, Values, check_only, num_layers, read_common, topk_moe

_V2_DEFAULTS = COMMON | {
    "vocab_size": 102_400,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
    "first_k_dense_replace": 0,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": None,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "n_group": None,
    "topk_group": None,
}
_V3_DEFAULTS = COMMON | {
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_interleave": True,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "num_nextn_predict_layers": 1,
}


def _read(values: Values, router: TopK, interleaved: bool) -> ModelConfig:
    check_only(values, {"mlp_bias": False, "moe_layer_freq": 1})
    num_heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if kv_heads is not None and kv_heads < num_heads:  # transformers ignores more, too
        check_only(values, {"num_key_value_heads": num_heads})
    has_bias = values["attention_bias"]
    num_dense = min(values["first_k_dense_replace"], len(num_layers(values)))
    d_expert = values["moe_intermediate_size"]
    # head_dim is the rotated part alone, and keys have as many heads as queries
    common = read_common(values) | {"head_dim": None, "num_kv_heads": None}
    return ModelConfig(
        **common,
        d_ff=values["intermediate_size"],
        dense_layers=tuple(range(num_dense)),
        attention=AttentionConfig(
            qkv_bias=has_bias,
            o_bias=has_bias,
            rope_interleaved=interleaved,
            latent=LatentConfig(
                q_rank=values["q_lora_rank"],
                kv_rank=values["kv_lora_rank"],
                nope_dim=values["qk_nope_head_dim"],
                rope_dim=values["qk_rope_head_dim"],
                v_dim=values["v_head_dim"],
            ),
        ),
        moe=MoEConfig(
            num_experts=values["n_routed_experts"],
            d_expert=d_expert,
            d_shared=values["n_shared_experts"] * d_expert,
            router=router,
        ),
    )


def _write(config: ModelConfig) -> Values:
    moe, router = topk_moe(config)
    latent = config.attention.latent
    assert latent is not None, "why_not was not asked"
    return {
        "head_dim": latent.rope_dim,
        "num_key_value_heads": config.num_heads,
        "intermediate_size": config.d_ff or config.d_model,
        "moe_intermediate_size": moe.d_expert,
        "first_k_dense_replace": len(set(config.dense_layers)),
        "n_routed_experts": moe.num_experts,
        # transformers always creates shared experts, so it cannot express none
        "n_shared_experts": max(1, moe.d_shared // moe.d_expert),
        "num_experts_per_tok": router.k,
        "routed_scaling_factor": router.scale,
        "n_group": router.num_groups,
        "topk_group": router.top_groups,
        "norm_topk_prob": router.renormalize,
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.v_dim,
        "attention_bias": config.attention.qkv_bias,
    }


def _read_v2(values: Values) -> ModelConfig:
    method = values["topk_method"]
    if method not in ("greedy", "group_limited_greedy"):
        raise ModelFileError(
            f"config.json has topk_method = {method!r}; the known ones of deepseek_v2 are greedy "
            "and group_limited_greedy."
        )
    has_groups = method == "group_limited_greedy"
    router = TopK(
        k=values["num_experts_per_tok"],
        renormalize=False,  # the model never reads norm_topk_prob
        scale=values["routed_scaling_factor"],
        num_groups=values["n_group"] if has_groups else 1,
        top_groups=values["topk_group"] if has_groups else 1,
        group_score="max",
        balance_loss=0.0,
    )
    return _read(values, router, interleaved=True)


def _write_v2(config: ModelConfig) -> Values:
    values = _write(config)
    has_groups = values["n_group"] > 1
    return values | {"topk_method": "group_limited_greedy" if has_groups else "greedy"}


def _read_v3(values: Values) -> ModelConfig:
    router = TopK(
        k=values["num_experts_per_tok"],
        score="sigmoid",
        renormalize=bool(values["norm_topk_prob"]),
        scale=values["routed_scaling_factor"],
        num_groups=values["n_group"],
        top_groups=values["topk_group"],
        bias_update_rate=0.0,  # there is a bias, but a folder does not say how fast it moves
        balance_loss=0.0,
    )
    return _read(values, router, interleaved=bool(values["rope_interleave"]))


def _write_v3(config: ModelConfig) -> Values:
    return _write(config) | {
        "rope_interleave": config.attention.rope_interleaved,
        "num_nextn_predict_layers": 0,  # layers that predict further tokens are not kept
    }


_SHARED = ((".mlp.shared_expert.", ".mlp.shared_experts."),)
DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    read=_read_v2,
    write=_write_v2,
    experts=SeparateExperts(),
    defaults=_V2_DEFAULTS,
    may_be_null=("head_dim", "q_lora_rank"),
    aliases={"num_experts": "n_routed_experts"},
    renames=_SHARED,
    has_latent=True,
)
DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read=_read_v3,
    write=_write_v3,
    experts=SeparateExperts(),
    defaults=_V3_DEFAULTS,
    may_be_null=(
        "num_key_value_heads",
        "q_lora_rank",
        "rope_interleave",
        "norm_topk_prob",
        "num_nextn_predict_layers",
    ),
    aliases={
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    },
    renames=_SHARED,
    has_latent=True,
)
