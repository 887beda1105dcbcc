"""Attention with its norms and projections on the C++ kernels: which layers they support.

N rows of a part, D model width.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...kernels.attention import AttentionModules, AttentionOptions, RowAttention
from .grouped_query import Attention
from .parts import Part


class RowBackend:
    """Grouped-query attention of sequences that have a cache."""

    def __init__(self, layer: int, epsilon: float) -> None:
        self._layer = layer
        self._epsilon = epsilon
        self._known: RowAttention | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the addresses of parameters: a copy of the model has different ones."""
        return self.__dict__ | {"_known": None}

    def run(
        self, modules: Mapping[str, Any], x_ND: Tensor, part: Part
    ) -> tuple[Tensor, Tensor] | None:
        """Return the residual stream after attention and its norm, or None; see backend.py."""
        attention = modules["self_attn"]
        if part.new is None or part.is_adapted or not isinstance(attention, Attention):
            return None
        if attention.uses_rope and attention.interleaved:
            return None
        inside: Mapping[str, Any] = attention._modules
        used = AttentionModules(
            input_norm=modules["input_layernorm"],
            q=inside["q_proj"],
            k=inside["k_proj"],
            v=inside["v_proj"],
            o=inside["o_proj"],
            output_norm=modules["post_attention_layernorm"],
            q_norm=inside.get("q_norm"),
            k_norm=inside.get("k_norm"),
            attention=attention,
        )
        if self._known is None or not self._known.is_of(used):
            self._known = RowAttention(used, self._options(attention))
        return self._known.run(x_ND, part.rope, self._layer, part.new)

    def _options(self, attention: Attention) -> AttentionOptions:
        return AttentionOptions(
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            scale=attention.scale,
            epsilon=self._epsilon,
            window=attention.window,
            clip=attention.clip,
            rotates=attention.uses_rope,
        )
