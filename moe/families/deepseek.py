"""DeepSeek-V2 (softmax, groups judged by their best) and V3 (sigmoid, balancing bias)."""

from ...errors import ModelFileError
from ..attention_config import AttentionConfig, LatentAttention
from ..config import ModelConfig, MoEConfig
from ..expert_layouts import SeparateExperts
from ..router_config import TopK
from .family import Family
from .keys import Values, check_only, num_layers, read_common


def _read(values: Values, router: TopK, interleaved: bool) -> ModelConfig:
    check_only(values, {"mlp_bias": False, "moe_layer_freq": 1})
    has_bias = values.get("attention_bias", False)
    num_dense = min(values.get("first_k_dense_replace") or 0, len(num_layers(values)))
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
            latent=LatentAttention(
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
            d_shared=(values.get("n_shared_experts") or 0) * d_expert,
            router=router,
        ),
    )


def _write(config: ModelConfig) -> Values:
    moe, latent = config.moe, config.attention.latent
    assert moe is not None and latent is not None and isinstance(moe.router, TopK)
    return {
        "head_dim": latent.rope_dim,
        "num_key_value_heads": config.num_heads,
        "intermediate_size": config.d_ff or config.d_model,
        "moe_intermediate_size": moe.d_expert,
        "first_k_dense_replace": len(set(config.dense_layers)),
        "n_routed_experts": moe.num_experts,
        # transformers makes shared experts in any case, so none cannot be said
        "n_shared_experts": max(1, moe.d_shared // moe.d_expert),
        "num_experts_per_tok": moe.router.k,
        "routed_scaling_factor": moe.router.scale,
        "n_group": moe.router.num_groups,
        "topk_group": moe.router.top_groups,
        "norm_topk_prob": moe.router.renormalize,
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.v_dim,
        "attention_bias": config.attention.qkv_bias,
    }


def _read_v2(values: Values) -> ModelConfig:
    method = values.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ModelFileError(
            f"config.json has topk_method = {method!r}; the known ones of deepseek_v2 are greedy "
            "and group_limited_greedy."
        )
    has_groups = method == "group_limited_greedy"
    router = TopK(
        k=values["num_experts_per_tok"],
        renormalize=False,  # whatever norm_topk_prob says: the model never reads it
        scale=values.get("routed_scaling_factor", 1.0),
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
        renormalize=values.get("norm_topk_prob", True),
        scale=values.get("routed_scaling_factor", 2.5),
        num_groups=values.get("n_group") or 1,
        top_groups=values.get("topk_group") or 1,
        bias_update_rate=0.0,  # there is a bias, and a folder does not say how fast it moves
        balance_loss=0.0,
    )
    return _read(values, router, interleaved=values.get("rope_interleave", True))


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
    renames=_SHARED,
    has_latent=True,
)
DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read=_read_v3,
    write=_write_v3,
    experts=SeparateExperts(),
    renames=_SHARED,
    has_latent=True,
)
