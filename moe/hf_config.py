"""Our model configuration to and from a Hugging Face ``config.json``.

``qwen3_moe`` and ``qwen3`` say most of our models exactly. What they cannot say is written as
``model_type: moeyard`` with the same tensor names and a sentence that gives the reason.
"""

from typing import Any

from pydantic import ValidationError

from ..errors import ModelFileError
from .config import ModelConfig, MoEConfig
from .router_config import TopK

KNOWN_TYPES = ("qwen3_moe", "qwen3", "moeyard")
MOST_LAYERS = 10_000
SINGLE_VALUED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "rope_scaling": None,
}
"""Keys of the Qwen3 family that we support with one value only."""


def to_hf(config: ModelConfig, dtype: str, eos_token_id: int) -> dict[str, Any]:
    """Return the contents of ``config.json``."""
    reason = why_not_qwen3(config)
    if reason is not None:
        return {
            "model_type": "moeyard",
            "architectures": ["MoeyardForCausalLM"],
            "moeyard": config.model_dump(mode="json"),
            "not_qwen3_moe_because": reason,
            "dtype": dtype,
            "eos_token_id": eos_token_id,
        }
    values: dict[str, Any] = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": config.vocabulary,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff or config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
        "bos_token_id": None,
        "dtype": dtype,
        **SINGLE_VALUED,
    }
    moe = config.moe
    if moe is not None:
        assert isinstance(moe.router, TopK)
        values |= {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.router.k,
            "moe_intermediate_size": moe.d_expert,
            "norm_topk_prob": moe.router.renormalize,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(config.dense_layers),
            # Hugging Face's balance loss is k times ours at equal routing.
            "router_aux_loss_coef": moe.router.balance_loss / moe.router.k,
        }
    return values


def why_not_qwen3(config: ModelConfig) -> str | None:
    """Return why the Qwen3 architectures cannot say ``config``, or None when they can."""
    moe = config.moe
    if moe is None:
        return None
    if not isinstance(moe.router, TopK):
        return f"the router is {moe.router.kind}, and qwen3_moe knows top-k softmax only"
    router = moe.router
    if router.lookahead != "ffn_input":
        return f"the router reads the {router.lookahead}, and qwen3_moe's reads the ffn_input"
    if router.score != "softmax" or router.num_groups > 1 or router.scale != 1:
        return "the router has sigmoid scores, groups or a scale, and qwen3_moe's has none"
    if router.bias_update_rate is not None:
        return "the router has a balancing bias, and qwen3_moe's has none"
    if moe.activation != "swiglu":
        return f"the experts are {moe.activation}, and qwen3_moe is exported with swiglu only"
    if moe.d_shared:
        return "there is a shared expert, and qwen3_moe has none"
    return None


def from_hf(values: dict[str, Any]) -> ModelConfig:
    """Read a ``config.json``; unknown architectures and features raise :class:`ModelFileError`."""
    model_type = values.get("model_type")
    if model_type not in KNOWN_TYPES:
        raise ModelFileError(
            f"config.json has model_type {model_type!r}; the known ones are "
            f"{', '.join(KNOWN_TYPES)}."
        )
    try:
        if model_type == "moeyard":
            return ModelConfig.model_validate(values["moeyard"])
        return _from_qwen3(values)
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ModelFileError(
            f"config.json has a value of the wrong type ({error}); copy it again."
        ) from None
    except KeyError as error:
        raise ModelFileError(f"config.json has no {error.args[0]!r}; add it.") from None
    except ValidationError as error:
        problem = error.errors()[0]
        path = ".".join(str(part) for part in problem["loc"])
        raise ModelFileError(f"config.json: {path}: {problem['msg']}.") from None


def _from_qwen3(values: dict[str, Any]) -> ModelConfig:
    for key, supported in SINGLE_VALUED.items():
        if values.get(key, supported) != supported:
            raise ModelFileError(
                f"config.json has {key} = {values[key]!r}; only {supported!r} is supported."
            )
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ModelFileError(
            f"config.json has rope_type {rope['rope_type']!r}; only 'default' is supported."
        )
    num_layers = len(range(values["num_hidden_layers"]))  # a TypeError for what is no integer
    moe, dense_layers = None, []
    if values["model_type"] == "qwen3_moe":
        step, only = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers") or []
        if step == 1:  # does not count through the layers, whose number nobody has checked yet
            dense_layers = sorted(i for i in only if i in range(num_layers))
        elif num_layers > MOST_LAYERS:
            raise ModelFileError(
                f"config.json has num_hidden_layers = {num_layers}; the most is {MOST_LAYERS}."
            )
        else:
            dense_layers = [i for i in range(num_layers) if i in only or (i + 1) % step]
        router = TopK(
            k=values["num_experts_per_tok"],
            renormalize=values.get("norm_topk_prob", False),
            balance_loss=values.get("router_aux_loss_coef", 0.0) * values["num_experts_per_tok"],
        )
        moe = MoEConfig(
            # transformers 4 writes num_experts, 5 num_local_experts
            num_experts=values.get("num_local_experts") or values["num_experts"],
            d_expert=values["moe_intermediate_size"],
            router=router,
        )
    return ModelConfig(
        vocab_size=values["vocab_size"],
        d_model=values["hidden_size"],
        num_layers=num_layers,
        num_heads=values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"],
        head_dim=values.get("head_dim"),
        d_ff=values.get("intermediate_size"),
        moe=moe,
        dense_layers=tuple(dense_layers),
        max_positions=values["max_position_embeddings"],
        rope_theta=rope.get("rope_theta", values.get("rope_theta", 10_000.0)),
        rms_eps=values.get("rms_norm_eps", 1e-6),
        tie_embeddings=values.get("tie_word_embeddings", False),
    )
