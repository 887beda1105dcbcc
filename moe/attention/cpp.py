"""Which attention layers the C++ kernels run for single new positions, and with what."""

from collections.abc import Mapping
from typing import Any

from ...kernels.cpu.attention import AttentionModules, AttentionOptions, CppAttention
from .grouped_query import Attention


def cpp_attention(
    layer: Mapping[str, Any], epsilon: float, known: CppAttention | None
) -> CppAttention | None:
    """Return a decoder layer's attention for the C++ kernels, or None if they do not support it.

    ``layer`` holds the layer's modules by name; a dictionary, for attributes of modules are slow
    to look up. ``epsilon`` is that of all norms. ``known`` is returned if it still fits.
    """
    attention = layer["self_attn"]
    if not isinstance(attention, Attention) or (attention.uses_rope and attention.interleaved):
        return None
    inside: Mapping[str, Any] = attention._modules
    modules = AttentionModules(
        input_norm=layer["input_layernorm"],
        q=inside["q_proj"],
        k=inside["k_proj"],
        v=inside["v_proj"],
        o=inside["o_proj"],
        output_norm=layer["post_attention_layernorm"],
        q_norm=inside.get("q_norm"),
        k_norm=inside.get("k_norm"),
        attention=attention,
    )
    if known is not None and known.is_of(modules):
        return known
    return CppAttention(modules, _options(attention, epsilon))


def _options(attention: Attention, epsilon: float) -> AttentionOptions:
    return AttentionOptions(
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        scale=attention.scale,
        epsilon=epsilon,
        window=attention.window,
        clip=attention.clip,
        rotates=attention.uses_rope,
    )
