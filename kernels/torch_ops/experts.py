"""The expert MLP on torch's matrix products, with its backward written out.

T tokens, K choices, R = T*K routed rows, N <= R rows whose expert is here, in expert order,
D model width, F expert width, H rows of fc1, r some routed rows. Only x, the pre-activations, the
routing weights and the grouping are saved for backward. The expert outputs are not: the routing
gradient follows from the recomputed activation (SonicMoE's identities).
"""

from collections.abc import Collection, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..values.calls import ExpertCall
from ..values.expert_weights import ExpertWeights
from ..values.grouping import Grouping, group_tokens
from ..values.main_grads import MainGrads
from ..values.quantized_weights import SlotWeights
from ..values.row_channels import RowChannels
from . import grouped, loop


def expert_rows(
    x_TD: Tensor,
    grouping: Grouping,
    experts: SlotWeights,
    *,
    only: Iterable[int] | None = None,
    out_RD: Tensor | None = None,
    channels: RowChannels | None = None,
) -> Tensor:
    """Run the experts without gradients and return their outputs, ``[R, D]`` in expert order.

    ``only`` names the experts to run and ``out_RD`` receives their rows, so that experts can run in
    waves. A row's bits do not depend on the waves. ``channels`` are for experts stored by channel.
    """
    if isinstance(experts, ExpertWeights) and only is None and grouped.can_run(x_TD, experts):
        products = grouped.TorchProducts(grouping, experts)
        return grouped.forward(x_TD, grouping, experts, products)[1]
    if out_RD is None:
        out_RD = x_TD.new_empty(grouping.order_R.numel(), x_TD.shape[1])
    spans = loop.spans_of(grouping, experts, only)
    loop.infer(x_TD, grouping, experts, spans, out_RD, channels)
    return out_RD


def combine_rows(y_ND: Tensor, grouping: Grouping, weights_TK: Tensor | None) -> Tensor:
    """Return ``y_t = sum_k weights[t, k] * y_row(t, k)`` in k order, summed in weights' type.

    Routed rows without an expert contribute nothing; their lines are undefined.
    ``weights_TK = None`` sums the rows unweighted, at least in fp32.
    """
    inverse_TK = grouping.inverse_R.view(-1, grouping.num_choices)
    has_all = not y_ND.is_cuda and int(grouping.offsets_E1[-1]) == grouping.order_R.numel()
    absent_TK = None if has_all else inverse_TK >= grouping.offsets_E1[-1]
    if not y_ND.is_cuda and (weights_TK is None or weights_TK.dtype == y_ND.dtype):
        return _combine_at_once(y_ND, inverse_TK, absent_TK, weights_TK)
    return _combine_by_choice(y_ND, inverse_TK, absent_TK, weights_TK)


def _combine_at_once(
    y_ND: Tensor, inverse_TK: Tensor, absent_TK: Tensor | None, weights_TK: Tensor | None
) -> Tensor:
    """Read every line once and write every sum once, on the CPU."""
    if absent_TK is None:
        return F.embedding_bag(inverse_TK, y_ND, mode="sum", per_sample_weights=weights_TK)
    present_TK = ~absent_TK
    ends_T = present_TK.sum(dim=1).cumsum(dim=0)
    return F.embedding_bag(
        inverse_TK[present_TK],
        y_ND,
        F.pad(ends_T, (1, 0)),
        mode="sum",
        per_sample_weights=None if weights_TK is None else weights_TK[present_TK],
        include_last_offset=True,
    )


def _combine_by_choice(
    y_ND: Tensor, inverse_TK: Tensor, absent_TK: Tensor | None, weights_TK: Tensor | None
) -> Tensor:
    """One choice at a time: ``[T, D]`` fits a cache where ``[T, K, D]`` does not."""
    y_TD = None
    for k in range(inverse_TK.shape[1]):
        lines_T = inverse_TK[:, k]
        if absent_TK is not None:
            lines_T = lines_T.clamp(max=max(0, y_ND.shape[0] - 1))
            if y_ND.shape[0] == 0:
                continue
        part_TD = y_ND.index_select(0, lines_T)
        if weights_TK is not None:
            part_TD = part_TD * weights_TK[:, k : k + 1]
        else:
            part_TD = part_TD.to(torch.promote_types(y_ND.dtype, torch.float32))
        if absent_TK is not None:
            part_TD = part_TD.masked_fill(absent_TK[:, k : k + 1], 0)
        y_TD = part_TD if y_TD is None else y_TD.add_(part_TD)
    if y_TD is None:
        return y_ND.new_zeros(inverse_TK.shape[0], y_ND.shape[1])
    return y_TD.to(y_ND.dtype)


class TorchWaves:
    """A sum without gradients whose experts run in waves; see waves.py."""

    def __init__(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        num_experts: int,
        channels: RowChannels | None = None,
    ) -> None:
        self._x_TD, self._weights_TK, self._channels = x_TD, weights_TK, channels
        self._grouping = group_tokens(experts_TK, num_experts)
        self._y_RD: Tensor | None = None

    def add(self, experts: SlotWeights, only: Collection[int] | None = None) -> None:
        """Run all experts in slots, or ``only`` some of them."""
        rows = (self._x_TD, self._grouping, experts)
        self._y_RD = expert_rows(*rows, only=only, out_RD=self._y_RD, channels=self._channels)

    def lines(self, routed_r: Tensor) -> Tensor:
        """Return the lines of some routed rows, ``[r, D]`` in x's type; see waves.py."""
        return self._all_lines().index_select(0, self._grouping.inverse_R.index_select(0, routed_r))

    def fill(self, routed_r: Tensor, lines_rD: Tensor) -> None:
        """Take lines that were computed elsewhere."""
        self._y_RD = self._all_lines()
        self._y_RD.index_copy_(0, self._grouping.inverse_R.index_select(0, routed_r), lines_rD)

    def result(self) -> Tensor:
        """Return ``y``, ``[T, D]``."""
        return combine_rows(self._all_lines(), self._grouping, self._weights_TK)

    def _all_lines(self) -> Tensor:
        if self._y_RD is None:  # no expert has run here
            return self._x_TD.new_empty(self._grouping.order_R.numel(), self._x_TD.shape[1])
        return self._y_RD


def run(call: ExpertCall) -> Tensor:
    """Return ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, ``[T, D]``."""
    experts = call.experts
    if isinstance(experts, ExpertWeights) and torch.is_grad_enabled():
        y_TD: Tensor = ExpertMLP.apply(*call.rows, *experts.parameters, experts, call.recompute)
        return y_TD
    with torch.no_grad():  # quantized experts have no backward
        waves = TorchWaves(*call.rows, experts.num_experts)
        waves.add(experts)
        return waves.result()


class ExpertMLP(torch.autograd.Function):
    """``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, forward and backward.

    The parameters are passed in addition to ``experts`` because autograd tracks arguments only.
    ``recompute`` does not keep the pre-activations. ``make_products`` brings another library's
    grouped products; None chooses between ``F.grouped_mm`` and a loop.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x_TD,
        experts_TK,
        weights_TK,
        fc1_SHD,
        fc2_SDF,
        fc1_bias_SH,
        fc2_bias_SD,
        experts,
        recompute,
        make_products: grouped.MakeProducts | None = None,
    ):
        grouping = group_tokens(experts_TK, experts.num_experts)
        ctx.spans, ctx.products = None, None
        if make_products is None and grouped.can_run(x_TD, experts):
            make_products = grouped.TorchProducts
        if make_products is not None:
            ctx.products = make_products(grouping, experts)
            h_NH, y_ND = grouped.forward(x_TD, grouping, experts, ctx.products)
        else:
            ctx.spans = loop.spans_of(grouping, experts)
            h_NH, y_ND = loop.forward(x_TD, grouping, experts, ctx.spans)
        parameters = (fc1_SHD, fc2_SDF, fc1_bias_SH, fc2_bias_SD)
        ctx.save_for_backward(x_TD, weights_TK, None if recompute else h_NH, *parameters)
        ctx.grouping, ctx.experts = grouping, experts
        return combine_rows(y_ND, grouping, weights_TK)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        x_TD, weights_TK, h_NH, *parameters = ctx.saved_tensors
        grouping, experts = ctx.grouping, ctx.experts
        if h_NH is None and ctx.spans is None:
            h_NH = grouped.pre_activations(x_TD, grouping, experts, ctx.products)
        elif h_NH is None:
            h_NH = loop.pre_activations(x_TD, grouping, experts, ctx.spans)
        sums = experts.main_grads
        if sums is None:
            sums = MainGrads.empty_for(parameters, ctx.needs_input_grad[3:7])
        arguments = (grad_TD, x_TD, weights_TK, h_NH, grouping, experts)
        if ctx.spans is None:
            grad_x_ND, grad_weights_TK = grouped.backward(*arguments, ctx.products, sums)
        else:
            grad_x_ND, grad_weights_TK = loop.backward(*arguments, ctx.spans, sums)
        sums.is_empty = False
        grad_x_TD = combine_rows(grad_x_ND, grouping, None)
        grads = (None,) * 4 if experts.main_grads is not None else sums.totals
        return grad_x_TD, None, grad_weights_TK, *grads, None, None, None
