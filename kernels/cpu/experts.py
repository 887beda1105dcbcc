"""The expert MLP without gradients on the C++ kernels.

T tokens, K choices, R = T*K routed rows, E experts, D model width, F expert width.
"""

import ctypes
from array import array
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..values.activation import ACTIVATIONS
from ..values.expert_weights import ExpertWeights, SlotTable
from ..values.few_bits import FewBitsExpertWeights
from ..values.group_sparse import GroupSparseExpertWeights, GroupSparseMatrices
from ..values.grouping import outside
from ..values.quantized_weights import QuantizedExpertWeights, QuantizedMatrices, SlotWeights
from .library import TYPES, address, empty_fp32, functions_for
from .structures import (
    Biases,
    CombineArguments,
    ExpertArguments,
    GroupSparseExpertArguments,
    GroupSparseMatrix,
    QuantizedExpertArguments,
    QuantizedMatrix,
)


def can_run(x_TD: Tensor, weights_TK: Tensor, experts: SlotWeights | None = None) -> bool:
    """Say whether the kernels can take these rows, and these experts if given, without gradients.

    Sums over k run in fp32, so wider routing weights are not supported.
    """
    if functions_for(x_TD) is None or weights_TK.dtype not in TYPES:
        return False
    return experts is None or is_plain(experts)


def is_plain(experts: SlotWeights) -> bool:
    """Say whether every slot, and its biases, is one dense block, as the kernels need."""
    parts: tuple[Tensor, ...]
    if isinstance(experts, ExpertWeights):
        parts = (experts.fc1_SHD, experts.fc2_SDF)
    else:
        parts = experts.parts
    for part in parts:
        if part.stride()[1:] != (part.shape[2], 1):
            return False
    for bias in (experts.fc1_bias_SH, experts.fc2_bias_SD):
        if bias is not None and (bias.stride(1) != 1 or bias.dtype not in TYPES):
            return False
    return True


def as_int32(experts_TK: Tensor) -> Tensor:
    """Return the ids as int32; ids that do not fit stay out of range."""
    if experts_TK.dtype != torch.int32:
        limits = torch.iinfo(torch.int32)
        experts_TK = experts_TK.clamp(limits.min, limits.max).int()
    return experts_TK.contiguous()


class CppWaves:
    """``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, some experts at a time.

    Each routed row has an fp32 line that its expert fills; the lines are summed in k order. So the
    bits depend neither on the other rows nor on the order of the waves.
    """

    def __init__(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> None:
        functions = functions_for(x_TD)
        assert functions is not None, "can_run was not asked"
        self._functions = functions
        self._x_TD = x_TD
        self._experts_TK = as_int32(experts_TK)
        self._weights_TK = weights_TK.float().contiguous()
        self._lines_RD = empty_fp32(experts_TK.numel(), x_TD.shape[1])

    def add(self, experts: SlotWeights, only: Collection[int] | None = None) -> None:
        """Run all experts in slots, or ``only`` some of them.

        Raises ``ValueError`` for expert ids out of range.
        """
        assert is_plain(experts), "the slots are not dense"
        assert experts.d_model == self._x_TD.shape[1], "experts take another width"
        rows = (self._x_TD, self._experts_TK)
        if isinstance(experts, QuantizedExpertWeights):
            rest, _slots = _few_bits_arguments(*rows, experts, only, self._lines_RD)
            fc1, fc2 = _matrix(experts.fc1), _matrix(experts.fc2)
            quantized = QuantizedExpertArguments(rest=rest, fc1=fc1, fc2=fc2)
            wrong = self._functions.moeyard_quantized_experts(ctypes.byref(quantized))
        elif isinstance(experts, GroupSparseExpertWeights):
            rest, _slots = _few_bits_arguments(*rows, experts, only, self._lines_RD)
            up, down = _sparse_matrix(experts.fc1), _sparse_matrix(experts.fc2)
            sparse = GroupSparseExpertArguments(rest=rest, fc1=up, fc2=down)
            wrong = self._functions.moeyard_group_sparse_experts(ctypes.byref(sparse))
        else:
            assert experts.fc1_SHD.dtype == self._x_TD.dtype, "experts and rows differ in type"
            arguments, _slots = expert_arguments(*rows, experts, only, self._lines_RD)
            wrong = self._functions.moeyard_experts(ctypes.byref(arguments))
        check_rows(wrong, self._experts_TK, experts)

    def result(self) -> Tensor:
        """Return ``y``, ``[T, D]``."""
        return combine_lines(self._lines_RD, self._experts_TK, self._weights_TK, self._x_TD)


def combine_lines(
    lines_RD: Tensor, experts_TK: Tensor, weights_TK: Tensor | None, like_TD: Tensor
) -> Tensor:
    """Return ``sum_k weights[t, k] * lines[t * K + k]`` in ``like``'s type; None = weights of 1.

    Choices of -1 are left out.
    """
    functions = functions_for(like_TD, is_backward_ours=True)
    assert functions is not None, "these kernels filled the lines"
    y_TD = torch.empty_like(like_TD)
    arguments = CombineArguments(
        type=TYPES[y_TD.dtype],
        tokens=experts_TK.shape[0],
        choices=experts_TK.shape[1],
        d_model=y_TD.shape[1],
        threads=torch.get_num_threads(),
        lines=lines_RD.data_ptr(),
        weights=address(weights_TK),
        experts=experts_TK.data_ptr(),
        out=y_TD.data_ptr(),
    )
    functions.moeyard_combine(ctypes.byref(arguments))
    return y_TD


def check_rows(wrong: int, experts_TK: Tensor, experts: SlotTable) -> None:
    """Raise the error of the first wrong routed row; -1 means that no row is wrong."""
    if wrong >= 0:
        expert = int(experts_TK.flatten()[wrong])
        assert not 0 <= expert < experts.num_experts, f"expert {expert} has rows but no slot"
        raise ValueError(outside(expert, experts.num_experts))


def expert_arguments(
    x_TD: Tensor,
    experts_TK: Tensor,
    experts: ExpertWeights,
    only: Collection[int] | None,
    lines_RD: Tensor | None,
    hidden_RH: Tensor | None = None,
) -> "tuple[ExpertArguments, array[int] | None]":
    """Return the arguments, and the slot table; keep it alive as long as they are used."""
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


def _few_bits_arguments(
    x_TD: Tensor,
    experts_TK: Tensor,
    experts: FewBitsExpertWeights[Any],
    only: Collection[int] | None,
    lines_RD: Tensor,
) -> "tuple[ExpertArguments, array[int] | None]":
    """Return the arguments but for the matrices, and the slot table; keep it alive."""
    slots = _slots(experts, only)
    rest = ExpertArguments(
        type=TYPES[x_TD.dtype],
        activation=ACTIVATIONS.index(experts.activation),
        tokens=experts_TK.shape[0],
        choices=experts_TK.shape[1],
        d_model=experts.d_model,
        d_expert=experts.fc2.width,
        num_experts=experts.num_experts,
        threads=torch.get_num_threads(),
        is_wave=only is not None,
        x=x_TD.data_ptr(),
        experts=experts_TK.data_ptr(),
        slot_of=None if slots is None else slots.buffer_info()[0],
        lines=lines_RD.data_ptr(),
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


def _slots(experts: SlotTable, only: Collection[int] | None) -> "array[int] | None":
    """Return int32 ``[E]``: the slot of each expert to run, else -1; None = slot e is expert e."""
    if only is None:
        return None if experts.slot_of_E is None else array("i", experts.slot_of_E)
    slots = array("i", [-1]) * experts.num_experts
    for expert in only:
        slots[expert] = experts.slot(expert)
        assert slots[expert] >= 0, f"expert {expert} of the wave has no slot"
    return slots
