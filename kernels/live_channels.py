"""Which channels of experts some row needs: the door.

A channel is one of the F values between an expert's products, with its row of up and its column of
down. T tokens, K choices, F expert width, n some experts.
"""

from collections.abc import Sequence

from torch import Tensor

from .cpu import live_channels as cpp
from .trust import may_use_cpp
from .values.channel_weights import ChannelExpertWeights


def live_channels(
    x_TD: Tensor, experts_TK: Tensor, experts: ChannelExpertWeights, only: Sequence[int]
) -> Tensor | None:
    """Return which channels of the experts ``only`` some row needs, bool ``[n, F]``.

    A channel is needed if its ``act(gate)`` is above the limit of ``gate_EF``, or not 0 without
    limits, or not finite. Gate rows alone are read. The sums are those of the kernel that computes
    the experts, so its result does not depend on what other channels hold, if that is finite.
    None where the C++ kernels do not run: then every channel counts as needed.
    """
    if not may_use_cpp(x_TD):
        return None
    return cpp.live_channels(x_TD, experts_TK, experts, only)
