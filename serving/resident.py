"""The experts of a layer in memory, all of them, as a module and as memory to fill."""

from dataclasses import replace
from typing import cast

import torch
from torch import nn

from ..kernels.values.channel_weights import ChannelExpertWeights, ChannelLimits
from ..kernels.values.expert_weights import ExpertWeights
from ..kernels.values.quantized_weights import QuantizedExpertWeights, SlotWeights
from ..moe.experts.base import LayerExperts
from ..moe.experts.by_channel import ChannelExperts
from ..moe.experts.mixed import MixedExperts
from ..moe.experts.quantized import QuantizedExperts
from ..moe.experts.resident import Experts
from ..moe.folders.expert_layouts import ExpertViews
from ..moe.folders.expert_slots import empty_by_channel, empty_experts
from ..moe.folders.folder import ModelFolder
from ..moe.without_memory import without_memory
from .experts.sparsity import Sparsity

PARAMETERS = ("fc1", "fc2", "fc1_bias", "fc2_bias")
"""Of a module of experts, in the order of ``ExpertWeights.parameters``."""


def resident_experts(
    files: ModelFolder,
    layer: int,
    dtype: torch.dtype,
    sparsity: Sparsity | None = None,
    limits: ChannelLimits | None = None,
) -> tuple[LayerExperts, list[tuple[int, ExpertViews]]]:
    """Return the experts of a layer, unfilled, and each expert's memory.

    ``limits`` are those of a ``sparsity`` for this layer, if it has any.
    """
    moe = files.config.moe
    assert moe is not None, "only MoE layers have experts"
    if len(files.formats.kinds) > 1:
        return _mixed(files, layer, moe.num_experts, dtype)
    if sparsity is None:
        weights = empty_experts(files.config, moe.num_experts, dtype, files.packed)
    else:
        sizes = (moe.num_experts, dtype, sparsity.by_input)
        weights = empty_by_channel(files.config, *sizes, limits)
    return _as_module(weights), [(e, weights.slot_views(e)) for e in range(moe.num_experts)]


def _mixed(
    files: ModelFolder, layer: int, num_experts: int, dtype: torch.dtype
) -> tuple[LayerExperts, list[tuple[int, ExpertViews]]]:
    """Return experts of several widths; widths that the layer does not have take no memory."""
    parts: list[QuantizedExpertWeights] = []
    views: list[tuple[int, ExpertViews]] = []
    kind_of_E = [0] * num_experts
    for kind, packed in enumerate(files.formats.kinds):
        experts = files.formats.experts(layer, num_experts, kind)
        if not experts:
            continue
        slot_of_E = [-1] * num_experts
        for slot, expert in enumerate(experts):
            slot_of_E[expert], kind_of_E[expert] = slot, len(parts)
        weights = empty_experts(files.config, len(experts), dtype, packed)
        views += ((expert, weights.slot_views(slot_of_E[expert])) for expert in experts)
        # Only quantized experts have several widths.
        parts.append(replace(cast(QuantizedExpertWeights, weights), slot_of_E=tuple(slot_of_E)))
    return MixedExperts(parts, kind_of_E), views


def _as_module(weights: SlotWeights) -> LayerExperts:
    """Return a layer's experts as a module that holds ``weights``."""
    if isinstance(weights, ChannelExpertWeights):
        return ChannelExperts(weights)
    if not isinstance(weights, ExpertWeights):
        return QuantizedExperts(weights)
    num_experts, d_model, d_expert = weights.fc2_SDF.shape
    with without_memory():
        experts = Experts(d_model, d_expert, num_experts, activation=weights.activation)
    for name, part in zip(PARAMETERS, weights.parameters, strict=True):
        if part is not None:
            setattr(experts, name, nn.Parameter(part, requires_grad=False))
    return experts
