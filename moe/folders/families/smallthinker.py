"""SmallThinker: the router reads the residual before attention; ReGLU; lists of rotated and
windowed layers (https://huggingface.co/PowerInfer; it is not in transformers)."""

from ...config.attention import AttentionConfig
from ...config.model import ModelConfig
from ...config.moe import MoEConfig
from ...routers.topk import TopK
from ..expert_layouts import SeparateExperts
from .family import Family
from .keys import COMMON, Values, check_only, num_layers, read_common, topk_moe


def _read(values: Values) -> ModelConfig:
    check_only(values, {"moe_enable_secondary_experts": False})
    all_sparse = [1] * len(num_layers(values))
    check_only(values, {"moe_layer_layout": all_sparse})
    windowed = values.get("sliding_window_layout") or []
    rotated = values.get("rope_layout") or all_sparse
    window = values.get("sliding_window_size") or values.get("sliding_window")
    uses_softmax = values.get("moe_primary_router_apply_softmax", False)
    return ModelConfig(
        **read_common(values),
        attention=AttentionConfig(
            qk_norm=None,
            window=window if any(windowed) else None,
            window_layers=tuple(layer for layer, has in enumerate(windowed) if has),
            nope_layers=tuple(layer for layer, has in enumerate(rotated) if not has),
        ),
        moe=MoEConfig(
            num_experts=values["moe_num_primary_experts"],
            d_expert=values["moe_ffn_hidden_size"],
            activation="reglu",
            router=TopK(
                k=values["moe_num_active_primary_experts"],
                lookahead="attention_input",
                score="softmax" if uses_softmax else "sigmoid",
            ),
        ),
    )


def _write(config: ModelConfig) -> Values:
    moe, router = topk_moe(config)
    attention = config.attention
    layers = range(config.num_layers)
    return {
        "hidden_act": "relu",
        "moe_num_primary_experts": moe.num_experts,
        "moe_num_active_primary_experts": router.k,
        "moe_ffn_hidden_size": moe.d_expert,
        "moe_primary_router_apply_softmax": router.score == "softmax",
        "moe_enable_secondary_experts": False,
        "moe_layer_layout": [1] * config.num_layers,
        "rope_layout": [int(layer not in attention.nope_layers) for layer in layers],
        "sliding_window_layout": [int(layer in attention.window_layers) for layer in layers],
        "sliding_window_size": attention.window,
        # for readers that run the folder's own code; moeyard never does
        "norm_topk_prob": router.renormalize,
    }


SMALLTHINKER = Family(
    model_type="smallthinker",
    architecture="SmallThinkerForCausalLM",
    read=_read,
    write=_write,
    defaults=COMMON | {"num_key_value_heads": None, "head_dim": None},
    experts=SeparateExperts("block_sparse_moe.experts", gate="gate", up="up", down="down"),
    renames=((".mlp.gate.", ".block_sparse_moe.primary_router."),),
    activation=None,
    is_in_transformers=False,
)
