"""The expert MLP without gradients on the C++ kernels.

T tokens, K choices, R = T*K routed rows, E experts, D model width, F expert width,
r some routed rows.
"""

import ctypes
from collections.abc import Collection

import torch
from torch import Tensor

from ..values.channel_weights import ChannelExpertWeights
from ..values.expert_weights import ExpertWeights, SlotTable
from ..values.group_sparse import GroupSparseExpertWeights
from ..values.grouping import outside
from ..values.quantized_weights import QuantizedExpertWeights, SlotWeights
from ..values.row_channels import RowChannels
from ..values.two_of_four import TwoOfFourExpertWeights
from .expert_arguments import (
    channel_arguments,
    expert_arguments,
    group_sparse_arguments,
    quantized_arguments,
    two_of_four_arguments,
)
from .library import TYPES, address, empty_fp32, functions_for
from .structures import CombineArguments


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
    elif isinstance(experts, ChannelExpertWeights):
        parts = experts.parts
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

    def __init__(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        channels: RowChannels | None = None,
    ) -> None:
        functions = functions_for(x_TD)
        assert functions is not None, "can_run was not asked"
        self._functions = functions
        self._x_TD, self._channels = x_TD, channels
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
        assert self._channels is None or isinstance(experts, ChannelExpertWeights), "no channels"
        if isinstance(experts, QuantizedExpertWeights):
            quantized, _slots = quantized_arguments(*rows, experts, only, self._lines_RD)
            wrong = self._functions.moeyard_quantized_experts(ctypes.byref(quantized))
        elif isinstance(experts, GroupSparseExpertWeights):
            sparse, _slots = group_sparse_arguments(*rows, experts, only, self._lines_RD)
            wrong = self._functions.moeyard_group_sparse_experts(ctypes.byref(sparse))
        elif isinstance(experts, TwoOfFourExpertWeights):
            packed, _slots = two_of_four_arguments(*rows, experts, only, self._lines_RD)
            wrong = self._functions.moeyard_two_of_four_experts(ctypes.byref(packed))
        elif isinstance(experts, ChannelExpertWeights):
            assert experts.fc1.dtype == self._x_TD.dtype, "experts and rows differ in type"
            channels = self._channels or RowChannels()
            channels.check(len(self._lines_RD), experts.fc2_SFD.shape[1], self._x_TD.dtype)
            by_channel, _slots = channel_arguments(*rows, experts, only, self._lines_RD, channels)
            wrong = self._functions.moeyard_channel_experts(ctypes.byref(by_channel))
        else:
            assert experts.fc1_SHD.dtype == self._x_TD.dtype, "experts and rows differ in type"
            arguments, _slots = expert_arguments(*rows, experts, only, self._lines_RD)
            wrong = self._functions.moeyard_experts(ctypes.byref(arguments))
        check_rows(wrong, self._experts_TK, experts)

    def lines(self, routed_r: Tensor) -> Tensor:
        """Return the lines of some routed rows, fp32 ``[r, D]``; see waves.py."""
        return self._lines_RD.index_select(0, routed_r)

    def fill(self, routed_r: Tensor, lines_rD: Tensor) -> None:
        """Take lines that were computed elsewhere."""
        self._lines_RD.index_copy_(0, routed_r, lines_rD)

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
