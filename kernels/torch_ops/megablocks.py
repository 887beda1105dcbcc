"""The expert MLP on MegaBlocks' grouped products (github.com/databricks/megablocks, 0.10).

This uses MegaBlocks' grouped product only, ``grouped_gemm_util.backend.gmm``. torch sorts rows,
computes activations and sums over k, because MegaBlocks' scatter leaves the lines of rows without
an expert undefined. The products read the group sizes on the host, so every call waits for the
device, as MegaBlocks' layers do.

T tokens, K choices, R = T*K routed rows in expert order, D model width, S slots; P and Q stand for
the inputs and outputs of a product.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..values.calls import ExpertCall
from ..values.channel_weights import ChannelExpertWeights
from ..values.expert_weights import ExpertWeights
from ..values.grouping import Grouping
from .experts import ExpertMLP

HOW_TO_BUILD = "docs/backends.md says how to build it"


def why_not(device: torch.device) -> str | None:
    """Return one sentence on why MegaBlocks cannot run on ``device``, or None if it can.

    It is imported only on machines with a GPU, because importing it loads its CUDA parts.
    """
    if importlib.util.find_spec("megablocks") is None:
        return f"MegaBlocks is not installed; {HOW_TO_BUILD}."
    if device.type != "cuda":
        return "MegaBlocks needs a CUDA device."
    return _load()[1]


@functools.cache
def _load() -> tuple[Callable[..., Tensor] | None, str | None]:
    """Return MegaBlocks' grouped product, or why there is none."""
    try:
        util: Any = importlib.import_module("megablocks.grouped_gemm_util")
    except Exception as error:  # compiled parts that do not fit can raise anything
        reason = " ".join(str(error).split()).rstrip(".")
        problem = f"MegaBlocks is installed but not importable ({type(error).__name__}: {reason})"
        return None, f"{problem}; {HOW_TO_BUILD}."
    if util.backend is None:
        return None, f"MegaBlocks is installed without its grouped_gemm; {HOW_TO_BUILD}."
    return util.backend.gmm, None


class MegablocksProducts:
    """Grouped products by ``gmm(a, b, sizes)``; see :class:`.grouped.GroupedProducts`."""

    def __init__(self, grouping: Grouping, experts: ExpertWeights) -> None:
        gmm, _ = _load()
        assert gmm is not None, "why_not was not asked"
        self._gmm = gmm
        here, offsets_E1 = experts.consecutive, grouping.offsets_E1.cpu().long()
        assert here is not None, "the experts were not checked"
        has_others = offsets_E1[here.start] > 0 or offsets_E1[here.stop] < offsets_E1[-1]
        assert not has_others, "an expert that is not here has rows"
        self._sizes_S = offsets_E1[here.start : here.stop + 1].diff()
        self._idle = torch.nonzero(self._sizes_S == 0).flatten().tolist()

    def rows(self, x_RP: Tensor, weight_SPQ: Tensor) -> Tensor:
        """Return ``x_r @ weight_slot(r)``."""
        if len(self._idle) == len(self._sizes_S):
            return x_RP.new_empty(x_RP.shape[0], weight_SPQ.shape[2])
        is_transposed = not weight_SPQ.is_contiguous()
        weight = weight_SPQ.transpose(1, 2) if is_transposed else weight_SPQ
        return self._gmm(x_RP.contiguous(), weight, self._sizes_S, trans_b=is_transposed)

    def sums(self, left_RQ: Tensor, right_RP: Tensor) -> Tensor:
        """Return each slot's ``left_rows^T @ right_rows``."""
        if len(self._idle) == len(self._sizes_S):
            return left_RQ.new_zeros(len(self._sizes_S), left_RQ.shape[1], right_RP.shape[1])
        left_RQ, right_RP = left_RQ.contiguous(), right_RP.contiguous()
        total_SQP = self._gmm(left_RQ, right_RP, self._sizes_S, trans_a=True)
        if self._idle:  # gmm may not write their products
            total_SQP[self._idle] = 0
        return total_SQP


def run(call: ExpertCall) -> Tensor:
    """Return ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, ``[T, D]``."""
    experts = call.experts
    assert isinstance(experts, ExpertWeights), "others are a misfit"
    arguments = (*call.rows, *experts.parameters, experts, call.recompute)
    y_TD: Tensor = ExpertMLP.apply(*arguments, MegablocksProducts)
    return y_TD


def misfit(call: ExpertCall) -> str | None:
    """Return one sentence on what MegaBlocks does not support in a call, or None."""
    x_TD, experts = call.x_TD, call.experts
    if not isinstance(experts, ExpertWeights):
        return "MegaBlocks does not take quantized experts."
    if isinstance(experts, ChannelExpertWeights):
        return "MegaBlocks does not take experts stored by channel."
    if x_TD.dtype != torch.bfloat16:
        return f"MegaBlocks' grouped products take bf16, not {x_TD.dtype}."
    if experts.consecutive is None:
        return "MegaBlocks needs experts in the order of their slots; this slot table has another."
    fc1_SHD, fc2_SDF = experts.fc1_SHD, experts.fc2_SDF
    for name, weight in (("fc1", fc1_SHD), ("fc2", fc2_SDF)):
        if not weight.is_contiguous():
            return f"{name} has strides {weight.stride()}; MegaBlocks needs it contiguous."
    for side in (*fc1_SHD.shape[1:], fc2_SDF.shape[2]):
        if side % 8:
            return f"A matrix has a side of {side}; MegaBlocks needs multiples of 8."
    return None
