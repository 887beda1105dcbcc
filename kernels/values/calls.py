"""A call of the expert MLP, and the description of a backend that can run it.

T tokens, K choices, D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .channel_weights import ChannelExpertWeights
from .expert_weights import ExpertWeights
from .quantized_weights import Bits, SlotWeights


class ExpertCall(NamedTuple):
    """The arguments of ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``."""

    x_TD: Tensor
    experts_TK: Tensor
    """int32 or int64 expert ids; -1 = no expert."""
    weights_TK: Tensor
    experts: SlotWeights
    recompute: bool = False
    """Whether backward computes fc1 again instead of keeping its output."""
    most_choices: int | None = None
    """At most so many of ``experts_TK`` are experts, where the caller knows; None = T * K."""

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, ids and weights."""
        return self.x_TD, self.experts_TK, self.weights_TK

    def check(self) -> None:
        """Raise ``ValueError`` for calls that no backend supports."""
        x, ids, weights = (tuple(tensor.shape) for tensor in self.rows)
        if not (len(x) == len(ids) == 2 and ids == weights and x[0] == ids[0]):
            raise ValueError(
                f"x {x}, experts {ids} and weights {weights} do not fit; they must be [T, D], "
                "[T, K] and [T, K]."
            )
        if self.experts_TK.dtype not in (torch.int32, torch.int64) or (
            not self.weights_TK.is_floating_point()
        ):
            raise ValueError(
                f"experts have type {self.experts_TK.dtype} and weights {self.weights_TK.dtype}; "
                "experts must be int32 or int64, and weights floating point."
            )
        self._check_width_and_device()

    def _check_width_and_device(self) -> None:
        experts, x_TD = self.experts, self.x_TD
        if isinstance(experts, ExpertWeights):
            one, dtype = experts.fc1_SHD, experts.fc1_SHD.dtype
        elif isinstance(experts, ChannelExpertWeights):
            one, dtype = experts.fc1, experts.fc1.dtype
        else:
            one, dtype = experts.fc1.values, x_TD.dtype
        if x_TD.shape[1] != experts.d_model or x_TD.dtype != dtype:
            raise ValueError(
                f"x has width {x_TD.shape[1]} and type {x_TD.dtype}, but the experts take "
                f"{experts.d_model} and {dtype}."
            )
        device = x_TD.device
        if any(tensor.device != device for tensor in (self.experts_TK, self.weights_TK, one)):
            devices = {str(tensor.device) for tensor in (*self.rows, one)}
            raise ValueError(
                f"x, experts, weights and fc1 are on {' and '.join(sorted(devices))}; move them "
                "to one device."
            )


@dataclass(frozen=True, slots=True)
class ExpertBackend:
    """One way to compute the expert MLP."""

    name: str
    why_not: Callable[[torch.device], str | None]
    """Return one sentence on why it cannot run on a device, or None if it can."""
    misfit: Callable[[ExpertCall], str | None]
    """Return one sentence on what it does not support in a call, or None."""
    run: Callable[[ExpertCall], Tensor]
    """Return y, ``[T, D]``; call it only if both functions above return None."""
    is_trusted: Callable[[ExpertCall], bool]
    """Say whether ``auto`` may choose it: it is available and passes its self-check."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Device types that it is meant for."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    """Types that ``moeyard doctor`` checks it in."""
    bits: tuple[Bits, ...] = ()
    """Bits of quantized weights whose kernels need a separate check."""
