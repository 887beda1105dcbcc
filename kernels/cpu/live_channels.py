"""Which channels of experts some row needs, on the C++ kernels.

T tokens, K choices, E experts, F expert width, n some experts.
"""

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ..values.channel_weights import ChannelExpertWeights
from .expert_arguments import channel_arguments
from .experts import as_int32, check_rows, is_plain
from .library import functions_for
from .structures import LiveChannelArguments


def live_channels(
    x_TD: Tensor, experts_TK: Tensor, experts: ChannelExpertWeights, only: Sequence[int]
) -> Tensor | None:
    """Return bool ``[n, F]`` for the experts ``only``; None for rows that the kernels do not take.

    Raises ``ValueError`` for expert ids out of range.
    """
    functions = functions_for(x_TD)
    if functions is None or experts.by_input or not is_plain(experts):
        return None
    assert experts.fc1.dtype == x_TD.dtype, "experts and rows differ in type"
    live_nF = torch.zeros(len(only), experts.fc2_SFD.shape[1], dtype=torch.uint8)
    line_of = array("i", [-1]) * experts.num_experts
    for line, expert in enumerate(only):
        line_of[expert] = line
    experts_TK = as_int32(experts_TK)
    of, _slots = channel_arguments(x_TD, experts_TK, experts, only, None)
    arguments = LiveChannelArguments(
        of=of, line_of=line_of.buffer_info()[0], live=live_nF.data_ptr()
    )
    check_rows(functions.moeyard_live_channels(ctypes.byref(arguments)), experts_TK, experts)
    return live_nF.bool()
