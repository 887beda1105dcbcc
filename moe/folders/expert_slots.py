"""Memory for routed experts outside a module's parameters: all of a model, or a cache of some.

S slots, D model width, F expert width.
"""

from math import prod
from typing import Any

import torch

from ...kernels.values.channel_weights import (
    ChannelExpertWeights,
    ChannelLimits,
    empty_channel_slots,
)
from ...kernels.values.expert_weights import ExpertWeights, empty_slots
from ...kernels.values.group_sparse import GroupSparseExpertWeights
from ...kernels.values.quantized_weights import (
    QuantizedExpertWeights,
    QuantizedMatrices,
    SlotWeights,
    empty_matrices,
)
from ...kernels.values.two_of_four import TwoOfFourExpertWeights
from ..config.model import LayersConfig
from .compressed_tensors import PackedFormat
from .expert_layouts import part_shapes
from .group_sparse_format import GroupSparseFormat, StoredFormat
from .two_of_four_format import TwoOfFourFormat


def empty_experts(
    config: LayersConfig, num_slots: int, dtype: torch.dtype, packed: StoredFormat | None
) -> SlotWeights:
    """Allocate ``num_slots`` experts of a model on the CPU, in few bits as ``packed`` says.

    Biases are always in ``dtype``.
    """
    moe, d_model = config.moe, config.d_model
    assert moe is not None, "only MoE models have experts"
    shapes = ((moe.fc1_rows, d_model), (d_model, moe.d_expert))
    how: dict[str, Any] = {"activation": moe.activation}
    if moe.expert_bias:
        biases = (torch.empty(num_slots, rows, dtype=dtype) for rows, _ in shapes)
        how["fc1_bias_SH"], how["fc2_bias_SD"] = biases
    if packed is None:
        fc1, fc2 = (empty_slots(num_slots, *shape, dtype) for shape in shapes)
        return ExpertWeights(fc1, fc2, **how)
    if isinstance(packed, GroupSparseFormat):
        sparse1, sparse2 = (packed.empty(num_slots, *shape) for shape in shapes)
        return GroupSparseExpertWeights(sparse1, sparse2, **how)
    if isinstance(packed, TwoOfFourFormat):
        half1, half2 = (packed.empty(num_slots, *shape) for shape in shapes)
        return TwoOfFourExpertWeights(half1, half2, **how)
    packed1, packed2 = (_empty_packed(num_slots, *shape, packed) for shape in shapes)
    return QuantizedExpertWeights(packed1, packed2, **how)


def empty_by_channel(
    config: LayersConfig,
    num_slots: int,
    dtype: torch.dtype,
    by_input: bool,
    limits: ChannelLimits | None = None,
) -> ChannelExpertWeights:
    """Allocate ``num_slots`` experts stored by channel on the CPU."""
    moe, d_model = config.moe, config.d_model
    assert moe is not None, "only MoE models have experts"
    how: dict[str, Any] = {"by_input": by_input, "activation": moe.activation, "limits": limits}
    if moe.expert_bias:
        how["fc1_bias_SH"] = torch.empty(num_slots, moe.fc1_rows, dtype=dtype)
        how["fc2_bias_SD"] = torch.empty(num_slots, d_model, dtype=dtype)
    sizes = (num_slots, d_model, moe.d_expert)
    parts = empty_channel_slots(*sizes, by_input, dtype, moe.activation)
    return ChannelExpertWeights(*parts, **how)


def expert_bytes(config: LayersConfig, dtype: torch.dtype, packed: StoredFormat | None) -> int:
    """Return the bytes of one expert."""
    moe = config.moe
    assert moe is not None, "only MoE models have experts"
    total = 0
    for part, shape in part_shapes(moe, config.d_model).items():
        if packed is None or len(shape) == 1:
            total += prod(shape) * dtype.itemsize
        else:
            stored = packed.stored(f"{part}.weight", *shape).values()
            total += sum(prod(s) * t.itemsize for t, s in stored if t != torch.int64)
    return total


def _empty_packed(num_slots: int, rows: int, width: int, packed: PackedFormat) -> QuantizedMatrices:
    group_size = packed.width_of_group("fc1 or fc2", width)
    return empty_matrices(num_slots, rows, width, packed.bits, group_size, torch.device("cpu"))
