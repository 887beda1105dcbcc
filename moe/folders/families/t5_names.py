"""Names of tensors in folders of T5 and Switch Transformer: two stacks of blocks with sublayers.

Ours number the layers of both stacks in one row, so a name needs the first stack's length.
"""

from ..expert_layouts import SeparateExperts

_OUTSIDE = {
    "embed_tokens.weight": "shared.weight",
    "embed_source_distances.weight": (
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    "embed_target_distances.weight": (
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    "source_norm.weight": "encoder.final_layer_norm.weight",
    "target_norm.weight": "decoder.final_layer_norm.weight",
}
_ATTENTION = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}


class StackNames:
    """Names of a model whose first ``num_source_layers`` layers are the encoder's."""

    def __init__(self, num_source_layers: int, mlp: str, is_gated: bool) -> None:
        """``mlp`` is the name of an MLP's module; those with a gate have two first matrices."""
        self._num_source_layers = num_source_layers
        self._mlp = mlp
        self._matrices = {"gate_proj": "wi_0", "up_proj": "wi", "down_proj": "wo"}
        if is_gated:
            self._matrices["up_proj"] = "wi_1"

    def of(self, parameter: str) -> str:
        """Return the folder's name of a tensor, such as ``layers.0.self_attn.q_proj.weight``."""
        if not parameter.startswith("layers."):
            return _OUTSIDE.get(parameter, parameter)
        _, layer, part, *rest = parameter.split(".")
        block, mlp = self.block(int(layer)), self.mlp(int(layer))
        if part in ("self_attn", "cross_attn"):
            module = "0.SelfAttention" if part == "self_attn" else "1.EncDecAttention"
            return ".".join([block, module, _ATTENTION[rest[0]], *rest[1:]])
        if part == "mlp":
            matrix, *leaf = rest
            inner = "router.classifier" if matrix == "gate" else self._matrices[matrix]
            return ".".join([mlp, self._mlp, inner, *leaf])
        norm = {"self_norm": f"{block}.0", "cross_norm": f"{block}.1", "mlp_norm": mlp}[part]
        return ".".join([norm, "layer_norm", *rest])

    def block(self, layer: int) -> str:
        """Return the name of a layer's list of sublayers."""
        if layer < self._num_source_layers:
            return f"encoder.block.{layer}.layer"
        return f"decoder.block.{layer - self._num_source_layers}.layer"

    def mlp(self, layer: int) -> str:
        """Return the name of the sublayer with the MLP: the last one."""
        return f"{self.block(layer)}.{1 if layer < self._num_source_layers else 2}"


class SwitchExperts(SeparateExperts):
    """A tensor for each matrix of each expert, in the MLP's place of its block."""

    def __init__(self, names: StackNames) -> None:
        super().__init__(up="wi", down="wo")
        self._stack = names

    def name(self, layer: int, expert: int, part: str) -> str:
        """Return the name of one part of one expert."""
        return f"{self._stack.mlp(layer)}.mlp.experts.expert_{expert}.{self._names[part]}.weight"
