"""All experts of a layer in memory, without a store."""

import torch
from torch import nn

from ...kernels.values.channel_weights import ChannelExpertWeights, ChannelLimits
from ...kernels.values.quantized_weights import QuantizedExpertWeights, SlotWeights
from ...moe.experts.base import LayerExperts
from ...moe.experts.by_channel import ChannelExperts
from ...moe.experts.quantized import QuantizedExperts
from ...moe.experts.resident import Experts
from ...moe.folders.expert_slots import empty_by_channel, empty_experts
from ...moe.folders.folder import ModelFolder
from ...moe.without_memory import without_memory
from .sparsity import Sparsity

PARAMETERS = ("fc1", "fc2", "fc1_bias", "fc2_bias")
"""Of a module of experts, in the order of ``ExpertWeights.parameters``."""


def empty_weights(
    folder: ModelFolder,
    num_experts: int,
    dtype: torch.dtype,
    sparsity: Sparsity | None,
    limits: ChannelLimits | None,
) -> SlotWeights:
    """Allocate the experts of a layer in the layout that they will be used in."""
    if sparsity is None:
        return empty_experts(folder.config, num_experts, dtype, folder.packed)
    return empty_by_channel(folder.config, num_experts, dtype, sparsity.by_input, limits)


def as_module(weights: SlotWeights) -> LayerExperts:
    """Return a layer's experts as a module that holds ``weights``."""
    if isinstance(weights, QuantizedExpertWeights):
        return QuantizedExperts(weights)
    if isinstance(weights, ChannelExpertWeights):
        return ChannelExperts(weights)
    num_experts, d_model, d_expert = weights.fc2_SDF.shape
    with without_memory():
        experts = Experts(d_model, d_expert, num_experts, activation=weights.activation)
    for name, part in zip(PARAMETERS, weights.parameters, strict=True):
        if part is not None:
            setattr(experts, name, nn.Parameter(part, requires_grad=False))
    return experts
