"""Memory for routed experts outside a module's parameters: a model's own, or a cache of some.

S slots, D model width, F expert width.
"""

from math import prod

import torch

from ..kernels.expert_weights import ExpertWeights, empty_slots
from .config import ModelConfig
from .expert_layouts import part_shapes


def empty_experts(config: ModelConfig, num_slots: int, dtype: torch.dtype) -> ExpertWeights:
    """Allocate ``num_slots`` experts of a model on the CPU."""
    moe = config.moe
    assert moe is not None, "only MoE models have experts"
    return ExpertWeights(
        empty_slots(num_slots, 2 * moe.d_expert, config.d_model, dtype),
        empty_slots(num_slots, config.d_model, moe.d_expert, dtype),
        activation=moe.activation,
    )


def expert_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one expert."""
    moe = config.moe
    assert moe is not None, "only MoE models have experts"
    shapes = part_shapes(moe, config.d_model).values()
    return sum(prod(shape) for shape in shapes) * dtype.itemsize
