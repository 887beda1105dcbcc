"""The Hugging Face names of our tensors, and which of them a configuration asks for."""

from collections.abc import Iterator

from .config import ModelConfig
from .router_config import TopK


def tensor_name(parameter: str) -> str:
    """Return the Hugging Face name of one of the decoder's own (non-expert) tensors."""
    return parameter if parameter.startswith("lm_head.") else f"model.{parameter}"


def expert_tensor_name(layer: int, expert: int, part: str) -> str:
    """Return the Hugging Face name of an expert's ``gate``, ``up`` or ``down`` matrix."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor that ``config`` asks for, layer by layer."""
    d_model, width = config.d_model, config.head_width
    embedding = (config.vocabulary, d_model)
    yield tensor_name("embed_tokens.weight"), embedding
    yield tensor_name("norm.weight"), (d_model,)
    if not config.tie_embeddings:
        yield "lm_head.weight", embedding
    q_width, kv_width = config.num_heads * width, config.kv_heads * width
    attention = {"q_proj": (q_width, d_model), "k_proj": (kv_width, d_model)}
    attention |= {"v_proj": (kv_width, d_model), "o_proj": (d_model, q_width)}
    for layer in range(config.num_layers):
        prefix = tensor_name(f"layers.{layer}.")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", (d_model,)
        for norm in ("q_norm", "k_norm"):
            yield f"{prefix}self_attn.{norm}.weight", (width,)
        for name, shape in attention.items():
            yield f"{prefix}self_attn.{name}.weight", shape
        yield from _mlp_tensors(config, layer, f"{prefix}mlp.")


def _mlp_tensors(
    config: ModelConfig, layer: int, prefix: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    moe, d_model = config.moe, config.d_model
    if moe is None or not config.is_moe(layer):
        assert config.d_ff is not None, "the configuration was not validated"
        yield from _gated_mlp(prefix, config.d_ff, d_model)
        return
    if isinstance(moe.router, TopK):
        yield f"{prefix}gate.weight", (moe.num_experts, d_model)
        if moe.router.bias_update_rate is not None:
            yield f"{prefix}gate.e_score_correction_bias", (moe.num_experts,)
    else:
        yield f"{prefix}gate.table_VK", (config.vocabulary, moe.router.k)
    for expert in range(moe.num_experts):
        yield from _gated_mlp(f"{prefix}experts.{expert}.", moe.d_expert, d_model)
    if moe.d_shared:
        yield from _gated_mlp(f"{prefix}shared_expert.", moe.d_shared, d_model)


def _gated_mlp(prefix: str, width: int, d_model: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}gate_proj.weight", (width, d_model)
    yield f"{prefix}up_proj.weight", (width, d_model)
    yield f"{prefix}down_proj.weight", (d_model, width)
