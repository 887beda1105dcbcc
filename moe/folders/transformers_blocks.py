"""Swap the MoE blocks of a transformers model for :class:`MoELayer`, in place.

E experts, D model width, F expert width, T tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, ModelFileError
from ..config.model import ModelConfig, decoder_config
from ..layer import MoELayer
from ..routers.routing import Routing
from ..routers.topk import TopKRouter
from .hf_config import from_hf

PLAIN_NAMES = {"experts.fc1": "experts.gate_up_proj", "experts.fc2": "experts.down_proj"}
"""Ours and theirs, for families whose experts have our layout."""
DEEPSEEK_NAMES = {
    **PLAIN_NAMES,
    **{
        f"shared_expert.{part}.weight": f"shared_experts.{part}.weight"
        for part in ("gate_proj", "up_proj", "down_proj")
    },
}
GPT_OSS_NAMES = {
    **PLAIN_NAMES,
    "experts.fc1_bias": "experts.gate_up_proj_bias",
    "experts.fc2_bias": "experts.down_proj_bias",
    "gate.weight": "router.weight",
    "gate.bias": "router.bias",
}
NAMES = {
    "mixtral": PLAIN_NAMES,
    "qwen2_moe": PLAIN_NAMES,
    "qwen3_moe": PLAIN_NAMES,
    "olmoe": PLAIN_NAMES,
    "deepseek_v2": DEEPSEEK_NAMES,
    "deepseek_v3": DEEPSEEK_NAMES,
    "gpt_oss": GPT_OSS_NAMES,
}
"""Families whose blocks can be swapped, and their parameters' names by ours where they differ."""


class TransformersMoE(MoELayer):
    """An :class:`MoELayer` with the forward and the ``state_dict`` of transformers' block."""

    def __init__(self, config: ModelConfig, layer: int, block: nn.Module, family: str) -> None:
        assert config.moe is not None, "only MoE models have blocks"
        with torch.device("meta"):
            super().__init__(
                config.d_model,
                config.moe.d_expert,
                config.moe.num_experts,
                config.router(layer),
                config.moe.activation,
                config.moe.d_shared,
                shared_gate=config.moe.shared_gate,
                expert_bias=config.moe.expert_bias,
            )
        self.family = family
        self.routing: Routing | None = None
        """Of the last forward, for :func:`moeyard.auxiliary_loss`."""
        theirs = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        for name in [*dict(self.named_parameters()), *dict(self.named_buffers())]:
            tensor = theirs[NAMES[family].get(name, name)]
            _put(self, name, _to_ours(family, name, tensor))
        router = "router" if family == "gpt_oss" else "gate"
        self.recorder = _only_records(block.get_submodule(router))
        self.register_state_dict_post_hook(_rename_for_transformers)
        self.register_load_state_dict_pre_hook(_rename_for_us)
        self.train(block.training)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        """Return what the block returned: ``[B, T, D]``, for gpt-oss with the weights ``[T, K]``.

        transformers records what the recorder returns as ``router_logits``.
        """
        y, self.routing = super().forward(x)
        if self.recorder._forward_hooks:
            assert isinstance(self.gate, TopKRouter)
            self.recorder(self.gate.logits(x.reshape(-1, x.shape[-1])))
        return (y, self.routing.weights_TK) if self.family == "gpt_oss" else y

    def __getstate__(self) -> dict[str, Any]:
        """Leave the routing out of copies: its tensors belong to a graph."""
        return {**self.__dict__, "routing": None}


def replace_moe_blocks(hf_model: nn.Module) -> int:
    """Swap every MoE block of a transformers model for an :class:`MoELayer`; return their number.

    Works for ``mixtral``, ``qwen2_moe``, ``qwen3_moe``, ``olmoe``, ``deepseek_v2``,
    ``deepseek_v3`` and ``gpt_oss``, with or without a head. Logits and gradients stay the same but
    for rounding, and training goes on. The parameters are the same objects with other names, so an
    optimizer keeps them. Only gpt-oss's experts are copied into another layout, one layer at a
    time: build the optimizer afterwards. ``state_dict`` keeps transformers' names and layouts, so
    ``save_pretrained`` writes the same files as before.

    ``output_router_logits`` goes on to work: transformers adds its balance loss. Where the model's
    configuration asks for it, ``moeyard.auxiliary_loss(layers, [layer.routing for layer in
    layers])`` is the same loss; ``layers`` are the modules of type :class:`MoELayer`. Add only one.

    Raises :class:`ConfigError` for other models, before anything is changed.
    """
    family = getattr(getattr(hf_model, "config", None), "model_type", None)
    if family not in NAMES:
        known = ", ".join(NAMES)
        raise ConfigError(
            f"the model is a {type(hf_model).__name__} of model_type {family!r}; the MoE blocks "
            f"of {known} can be replaced."
        )
    config = _config_of(hf_model)
    blocks = _blocks_of(hf_model)
    if not blocks and any(isinstance(module, TransformersMoE) for module in hf_model.modules()):
        return 0
    if len(blocks) != len(config.moe_layers):
        raise ConfigError(
            f"the {type(hf_model).__name__} has {len(blocks)} MoE blocks with weights that are not "
            f"quantized, but its configuration asks for {len(config.moe_layers)}; load it as "
            "transformers makes it."
        )
    for (parent, name), layer in zip(blocks, config.moe_layers, strict=True):
        setattr(parent, name, TransformersMoE(config, layer, getattr(parent, name), family))
    return len(blocks)


def _config_of(hf_model: nn.Module) -> ModelConfig:
    values = hf_model.config.to_dict()  # type: ignore[operator, union-attr]
    try:
        if values.get("router_jitter_noise"):
            raise ModelFileError(
                f"config.json has router_jitter_noise = {values['router_jitter_noise']}, which "
                "changes what experts read; set it to 0"
            )
        return decoder_config(from_hf(values))
    except ModelFileError as error:
        raise ConfigError(f"the MoE blocks cannot be replaced: {error}") from None


def _blocks_of(hf_model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return where the MoE blocks are, in the order of the layers."""
    found = []
    for parent in hf_model.modules():
        for name, block in parent.named_children():
            experts = getattr(block, "experts", None)
            if isinstance(block, MoELayer) or not isinstance(experts, nn.Module):
                continue
            if isinstance(getattr(experts, "gate_up_proj", None), nn.Parameter):
                found.append((parent, name))
    return found


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a module the tensor itself, not a copy."""
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    assert getattr(owner, last).shape == tensor.shape, f"{name} has another shape"
    setattr(owner, last, tensor)


def _only_records(gate: nn.Module) -> nn.Module:
    """Return transformers' router without weights: it hands on what it gets.

    transformers finds it by its class, and hooks that it already has go on to work.
    """
    gate._parameters.clear()
    gate._buffers.clear()
    gate.forward = _hand_on
    return gate


def _hand_on(logits_TE: Tensor) -> tuple[Tensor]:
    return (logits_TE,)


def _to_ours(family: str, name: str, tensor: Tensor) -> Tensor:
    """Return the same object, or gpt-oss's experts in our layout."""
    change = _LAYOUTS_OF_GPT_OSS.get(name) if family == "gpt_oss" else None
    if change is None:
        return tensor
    with torch.no_grad():
        ours = change[0](tensor).contiguous()
    return nn.Parameter(ours, tensor.requires_grad)


def _rename_for_transformers(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    assert isinstance(module, TransformersMoE)
    for ours, theirs in NAMES[module.family].items():
        if prefix + ours in state:
            tensor = state.pop(prefix + ours)
            if module.family == "gpt_oss" and ours in _LAYOUTS_OF_GPT_OSS:
                tensor = _LAYOUTS_OF_GPT_OSS[ours][1](tensor).contiguous()
            state[prefix + theirs] = tensor


def _rename_for_us(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, TransformersMoE)
    for ours, theirs in NAMES[module.family].items():
        if prefix + theirs in state:
            tensor = state.pop(prefix + theirs)
            if module.family == "gpt_oss" and ours in _LAYOUTS_OF_GPT_OSS:
                tensor = _LAYOUTS_OF_GPT_OSS[ours][0](tensor)
            state[prefix + ours] = tensor


def _gate_rows_first(x: Tensor) -> Tensor:
    """Take ``[E, 2F, ...]`` whose gate and up rows alternate."""
    return x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def _alternating(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def _fc1_of(gate_up_ED2F: Tensor) -> Tensor:
    return _gate_rows_first(gate_up_ED2F.mT)


def _gate_up_of(fc1_E2FD: Tensor) -> Tensor:
    return _alternating(fc1_E2FD).mT


def _transposed(x: Tensor) -> Tensor:
    return x.mT


_LAYOUTS_OF_GPT_OSS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "experts.fc1": (_fc1_of, _gate_up_of),
    "experts.fc1_bias": (_gate_rows_first, _alternating),
    "experts.fc2": (_transposed, _transposed),
}
"""From theirs to ours and back: gpt-oss computes ``x @ W``, and its gate and up rows alternate."""
