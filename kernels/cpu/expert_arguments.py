"""The arguments of the C++ expert kernels, from experts in any layout.

Each function returns the structure and the slot table; keep the table alive as long as they are
used.

T tokens, K choices, R = T*K routed rows, E experts, D model width, F expert width.
"""

from array import array
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..values.activation import ACTIVATIONS
from ..values.channel_weights import ChannelExpertWeights, ChannelLimits
from ..values.expert_weights import ExpertWeights, SlotTable
from ..values.few_bits import FewBitsExpertWeights
from ..values.group_sparse import GroupSparseExpertWeights, GroupSparseMatrices
from ..values.quantized_weights import QuantizedExpertWeights, QuantizedMatrices
from ..values.row_channels import RowChannels
from ..values.two_of_four import TwoOfFourExpertWeights, TwoOfFourMatrices
from .library import TYPES, address
from .structures import (
    Biases,
    ChannelExpertArguments,
    ExpertArguments,
    GroupSparseExpertArguments,
    GroupSparseMatrix,
    QuantizedExpertArguments,
    QuantizedMatrix,
    TwoOfFourExpertArguments,
    TwoOfFourMatrix,
)


def expert_arguments(
    x_TD: Tensor,
    experts_TK: Tensor,
    experts: ExpertWeights,
    only: Collection[int] | None,
    lines_RD: Tensor | None,
    hidden_RH: Tensor | None = None,
) -> "tuple[ExpertArguments, array[int] | None]":
    """Return the arguments of plain experts; ``hidden_RH`` is for training."""
    fc1, fc2 = experts.fc1_SHD, experts.fc2_SDF
    slots = _slots(experts, only)
    arguments = ExpertArguments(
        type=TYPES[x_TD.dtype],
        activation=ACTIVATIONS.index(experts.activation),
        tokens=experts_TK.shape[0],
        choices=experts_TK.shape[1],
        d_model=x_TD.shape[1],
        d_expert=fc2.shape[2],
        num_experts=experts.num_experts,
        threads=torch.get_num_threads(),
        fc1_stride=fc1.stride(0),
        fc2_stride=fc2.stride(0),
        is_wave=only is not None,
        x=x_TD.data_ptr(),
        fc1=fc1.data_ptr(),
        fc2=fc2.data_ptr(),
        experts=experts_TK.data_ptr(),
        slot_of=None if slots is None else slots.buffer_info()[0],
        lines=address(lines_RD),
        hidden=address(hidden_RH),
        fc1_bias=_biases(experts.fc1_bias_SH),
        fc2_bias=_biases(experts.fc2_bias_SD),
    )
    return arguments, slots


def quantized_arguments(
    x_TD: Tensor,
    experts_TK: Tensor,
    experts: QuantizedExpertWeights,
    only: Collection[int] | None,
    lines_RD: Tensor,
) -> "tuple[QuantizedExpertArguments, array[int] | None]":
    """Return the arguments of experts in 8 or 4 bits."""
    rest, slots = _rest(x_TD, experts_TK, experts, experts.fc2.width, only, lines_RD)
    fc1, fc2 = _matrix(experts.fc1), _matrix(experts.fc2)
    return QuantizedExpertArguments(rest=rest, fc1=fc1, fc2=fc2), slots


def group_sparse_arguments(
    x_TD: Tensor,
    experts_TK: Tensor,
    experts: GroupSparseExpertWeights,
    only: Collection[int] | None,
    lines_RD: Tensor,
) -> "tuple[GroupSparseExpertArguments, array[int] | None]":
    """Return the arguments of experts that keep some groups of inputs."""
    rest, slots = _rest(x_TD, experts_TK, experts, experts.fc2.width, only, lines_RD)
    fc1, fc2 = _sparse_matrix(experts.fc1), _sparse_matrix(experts.fc2)
    return GroupSparseExpertArguments(rest=rest, fc1=fc1, fc2=fc2), slots


def two_of_four_arguments(
    x_TD: Tensor,
    experts_TK: Tensor,
    experts: TwoOfFourExpertWeights,
    only: Collection[int] | None,
    lines_RD: Tensor,
) -> "tuple[TwoOfFourExpertArguments, array[int] | None]":
    """Return the arguments of experts of which two of four weights are stored."""
    rest, slots = _rest(x_TD, experts_TK, experts, experts.fc2.width, only, lines_RD)
    fc1, fc2 = _two_of_four(experts.fc1), _two_of_four(experts.fc2)
    return TwoOfFourExpertArguments(rest=rest, fc1=fc1, fc2=fc2), slots


def channel_arguments(
    x_TD: Tensor,
    experts_TK: Tensor,
    experts: ChannelExpertWeights,
    only: Collection[int] | None,
    lines_RD: Tensor | None,
    channels: RowChannels | None = None,
) -> "tuple[ChannelExpertArguments, array[int] | None]":
    """Return the arguments of experts that are stored by channel."""
    fc1, fc2_SFD = experts.parts
    rest, slots = _rest(x_TD, experts_TK, experts, fc2_SFD.shape[1], only, lines_RD)
    rest.fc1, rest.fc1_stride = fc1.data_ptr(), fc1.stride(0)
    rest.fc2, rest.fc2_stride = fc2_SFD.data_ptr(), fc2_SFD.stride(0)
    limits = experts.limits or ChannelLimits()
    channels = channels or RowChannels()
    arguments = ChannelExpertArguments(
        rest=rest,
        by_input=experts.by_input,
        x_limits=address(limits.x_ED),
        gate_limits=address(limits.gate_EF),
        act_limits=address(limits.act_EF),
        used=address(channels.used_RF),
        act=address(channels.act_RF),
    )
    return arguments, slots


def _rest(
    x_TD: Tensor,
    experts_TK: Tensor,
    experts: FewBitsExpertWeights[Any] | ChannelExpertWeights,
    d_expert: int,
    only: Collection[int] | None,
    lines_RD: Tensor | None,
) -> "tuple[ExpertArguments, array[int] | None]":
    """Return the arguments that do not depend on the layout of the matrices, and the slot table."""
    slots = _slots(experts, only)
    rest = ExpertArguments(
        type=TYPES[x_TD.dtype],
        activation=ACTIVATIONS.index(experts.activation),
        tokens=experts_TK.shape[0],
        choices=experts_TK.shape[1],
        d_model=x_TD.shape[1],
        d_expert=d_expert,
        num_experts=experts.num_experts,
        threads=torch.get_num_threads(),
        is_wave=only is not None,
        x=x_TD.data_ptr(),
        experts=experts_TK.data_ptr(),
        slot_of=None if slots is None else slots.buffer_info()[0],
        lines=address(lines_RD),
        fc1_bias=_biases(experts.fc1_bias_SH),
        fc2_bias=_biases(experts.fc2_bias_SD),
    )
    return rest, slots


def _biases(bias_SQ: Tensor | None) -> Biases:
    if bias_SQ is None:
        return Biases()
    return Biases(type=TYPES[bias_SQ.dtype], stride=bias_SQ.stride(0), values=bias_SQ.data_ptr())


def _matrix(matrices: QuantizedMatrices) -> QuantizedMatrix:
    values, scales = matrices.values, matrices.scales_SQG
    return QuantizedMatrix(
        values=values.data_ptr(),
        scales=scales.data_ptr(),
        bits=matrices.bits,
        group=matrices.group_size,
        stride=values.stride(0),
        scale_stride=scales.stride(0),
    )


def _sparse_matrix(matrices: GroupSparseMatrices) -> GroupSparseMatrix:
    values, columns, scales = matrices.tensors
    return GroupSparseMatrix(
        values=values.data_ptr(),
        columns=columns.data_ptr(),
        scales=scales.data_ptr(),
        kept=matrices.kept,
        column_bytes=columns.element_size(),
        value_stride=values.stride(0),
        column_stride=columns.stride(0),
        scale_stride=scales.stride(0),
    )


def _two_of_four(matrices: TwoOfFourMatrices) -> TwoOfFourMatrix:
    values, places = matrices.tensors
    return TwoOfFourMatrix(
        values=values.data_ptr(),
        places=places.data_ptr(),
        value_stride=values.stride(0),
        place_stride=places.stride(0),
    )


def _slots(experts: SlotTable, only: Collection[int] | None) -> "array[int] | None":
    """Return int32 ``[E]``: the slot of each expert to run, else -1; None = slot e is expert e."""
    if only is None:
        return None if experts.slot_of_E is None else array("i", experts.slot_of_E)
    slots = array("i", [-1]) * experts.num_experts
    for expert in only:
        slots[expert] = experts.slot(expert)
        assert slots[expert] >= 0, f"expert {expert} of the wave has no slot"
    return slots
