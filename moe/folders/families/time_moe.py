"""Time-MoE (Shi et al. 2024): a forecaster of series, point by point, with a shared expert.

transformers has no class for it; the authors' code opens such folders.
"""

from typing import Any

from ....errors import ModelFileError
from ...config.moe import MoEConfig
from ...config.time_moe import TimeMoeConfig
from ...routers.topk import TopK
from ..expert_layouts import SeparateExperts
from .family import Family
from .keys import Values, check_only, topk_moe

_ONLY: Values = {"input_size": 1, "use_dense": False, "tie_word_embeddings": False}
_DEFAULTS: Values = {
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "horizon_lengths": 1,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "num_experts_per_tok": 2,
    "num_experts": 1,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "apply_aux_loss": True,
    "router_aux_loss_factor": 0.02,
}


def _read(values: Values) -> TimeMoeConfig:
    check_only(values, _ONLY)
    k, d_ff, horizons = (
        values[key] for key in ("num_experts_per_tok", "intermediate_size", "horizon_lengths")
    )
    if type(k) is not int or k < 1 or type(d_ff) is not int or d_ff % k:
        raise ModelFileError(
            f"config.json has intermediate_size = {d_ff!r} and num_experts_per_tok = {k!r}; an "
            "expert has the width of their quotient, so give whole numbers that divide."
        )
    # The authors' loss is k at perfect balance where ours is 1.
    balance_loss = values["router_aux_loss_factor"] * k if values["apply_aux_loss"] else 0.0
    return TimeMoeConfig(
        d_model=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"],
        d_ff=d_ff,
        max_positions=values["max_position_embeddings"],
        rope_theta=values["rope_theta"],
        rms_eps=values["rms_norm_eps"],
        horizons=(horizons,) if isinstance(horizons, int) else tuple(horizons),
        moe=MoEConfig(
            num_experts=values["num_experts"],
            d_expert=d_ff // k,
            d_shared=d_ff,
            shared_gate=True,
            router=TopK(k=k, renormalize=False, balance_loss=balance_loss, balance_over="model"),
        ),
    )


def _write(config: TimeMoeConfig) -> Values:
    moe, router = topk_moe(config)
    layers = len(config.moe_layers) if router.balance_over == "layer" else 1
    return {
        "input_size": 1,
        "intermediate_size": moe.d_expert * router.k,
        "horizon_lengths": list(config.horizons),
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "num_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "use_dense": False,
        "apply_aux_loss": True,
        # The pooled loss that equals ours if all layers have the same counts.
        "router_aux_loss_factor": float(f"{router.balance_loss * layers / router.k:.12g}"),
        "tie_word_embeddings": False,
    }


def _write_common(config: Any) -> Values:
    return {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_positions,
    }


TIME_MOE = Family(
    model_type="time_moe",
    architecture="TimeMoeForPrediction",
    read=_read,
    write=_write,
    experts=SeparateExperts("ffn_layer.experts"),
    defaults=_DEFAULTS,
    renames=(
        ("embedding.value_proj", "embed_layer.emb_layer"),
        ("embedding.gate_proj", "embed_layer.gate_layer"),
        (".mlp.", ".ffn_layer."),
    ),
    is_in_transformers=False,
    kinds=("time_moe",),
    write_common=_write_common,
)
