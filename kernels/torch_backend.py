"""The expert MLP on torch's matrix products, with its backward written out.

T tokens, K choices, R = T*K routed rows, N <= R rows whose expert is here, in expert order,
D model width, F expert width, H = 2F. Only x, the pre-activations, the routing weights and the
grouping are saved for backward (the identities are SonicMoE's: reading the routing gradient off the
recomputed activation saves keeping the expert outputs).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from . import expert_fused, expert_loop
from .expert_weights import ExpertWeights
from .grouping import Grouping, group_tokens


def expert_rows(
    x_TD: Tensor,
    grouping: Grouping,
    experts: ExpertWeights,
    *,
    only: Iterable[int] | None = None,
    out_RD: Tensor | None = None,
) -> Tensor:
    """Run the experts without gradients and return their outputs, ``[R, D]`` in expert order.

    ``only`` names the experts to run and ``out_RD`` receives their rows, so that experts can come
    in waves; every row's bits are the same whichever waves it is split into.
    """
    if only is None and expert_fused.can_run(x_TD, experts):
        return expert_fused.forward(x_TD, grouping, experts)[1]
    if out_RD is None:
        out_RD = x_TD.new_empty(grouping.order_R.numel(), x_TD.shape[1])
    spans = expert_loop.spans_of(grouping, experts, only)
    expert_loop.infer(x_TD, grouping, experts, spans, out_RD)
    return out_RD


def combine_rows(y_ND: Tensor, grouping: Grouping, weights_TK: Tensor | None) -> Tensor:
    """Return ``y_t = sum_k weights[t, k] * y_row(t, k)`` in k order, summed in weights' type.

    Routed rows without an expert contribute nothing, whatever their (undefined) line holds.
    ``weights_TK = None`` sums the rows themselves, at least in fp32. One choice at a time:
    ``[T, D]`` fits a cache where ``[T, K, D]`` does not.
    """
    inverse_TK = grouping.inverse_R.view(-1, grouping.num_choices)
    has_all = not y_ND.is_cuda and int(grouping.offsets_E1[-1]) == grouping.order_R.numel()
    absent_TK = None if has_all else inverse_TK >= grouping.offsets_E1[-1]
    y_TD = None
    for k in range(grouping.num_choices):
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


class ExpertMLP(torch.autograd.Function):
    """``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, forward and backward.

    ``fc1`` and ``fc2`` are given beside ``experts`` because autograd tracks arguments only.
    """

    @staticmethod
    def forward(ctx, x_TD, experts_TK, weights_TK, fc1_SHD, fc2_SDF, experts):  # type: ignore[no-untyped-def]
        grouping = group_tokens(experts_TK, experts.num_experts)
        ctx.spans = None
        if expert_fused.can_run(x_TD, experts):
            h_NH, y_ND = expert_fused.forward(x_TD, grouping, experts)
        else:
            ctx.spans = expert_loop.spans_of(grouping, experts)
            h_NH, y_ND = expert_loop.forward(x_TD, grouping, experts, ctx.spans)
        ctx.save_for_backward(x_TD, weights_TK, h_NH, fc1_SHD, fc2_SDF)
        ctx.grouping, ctx.experts = grouping, experts
        return combine_rows(y_ND, grouping, weights_TK)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        x_TD, weights_TK, h_NH, fc1_SHD, fc2_SDF = ctx.saved_tensors
        grouping, experts = ctx.grouping, ctx.experts
        needed = ctx.needs_input_grad[3:5]
        sums = experts.main_grads
        if sums is None:
            sums = tuple(
                torch.zeros_like(weight) if is_needed else None
                for weight, is_needed in zip((fc1_SHD, fc2_SDF), needed, strict=True)
            )
        arguments = (grad_TD, x_TD, weights_TK, h_NH, grouping, experts)
        if ctx.spans is None:
            grad_x_ND, grad_weights_TK = expert_fused.backward(*arguments, sums)
        else:
            grad_x_ND, grad_weights_TK = expert_loop.backward(*arguments, ctx.spans, sums)
        grad_x_TD = combine_rows(grad_x_ND, grouping, None)
        grad_fc1, grad_fc2 = (None, None) if experts.main_grads else sums
        return grad_x_TD, None, grad_weights_TK, grad_fc1, grad_fc2, None
