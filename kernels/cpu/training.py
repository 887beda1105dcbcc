"""The expert MLP with gradients on the C++ kernels.

T tokens, K choices, R = T*K routed rows, N <= R rows with an expert, D model width, F expert width,
H rows of fc1.
"""

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..values.expert_weights import ExpertWeights
from ..values.main_grads import MainGrads
from .expert_arguments import expert_arguments
from .experts import as_int32, check_rows, combine_lines, is_plain
from .library import TYPES, address, empty_fp32, functions_for
from .structures import ExpertGradArguments


def can_train(x_TD: Tensor, weights_TK: Tensor, experts: ExpertWeights) -> bool:
    """Say whether the kernels can run forward and backward."""
    parameters = [part for part in experts.parameters if part is not None]
    if functions_for(x_TD, *parameters, is_backward_ours=True) is None:
        return False
    return weights_TK.dtype in TYPES and have_backward(experts)  # sums over k run in fp32


def have_backward(experts: ExpertWeights) -> bool:
    """Say whether the kernels' backward supports experts of these sizes, and their sums."""
    fc2, sums = experts.fc2_SDF, experts.main_grads
    has_pairs = fc2.shape[1] % 2 == 0 and fc2.shape[2] % 2 == 0  # bf16 is multiplied in pairs
    totals = [] if sums is None else [total for total in sums.totals if total is not None]
    are_fp32 = all(t.dtype == torch.float32 and t.is_contiguous() for t in totals)
    return has_pairs and are_fp32 and is_plain(experts)


class CppExpertMLP(torch.autograd.Function):
    """``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, forward and backward.

    Backward needs x, fc1's output for each row, and the routing. With ``recompute`` that output is
    not kept but computed again.
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
    ):
        experts_TK = as_int32(experts_TK)
        wide_TK = weights_TK.float().contiguous()
        y_TD, hidden_RH = forward_kept(x_TD, experts_TK, wide_TK, experts)
        kept_RH = None if recompute else hidden_RH
        ctx.experts, ctx.weights_dtype = experts, weights_TK.dtype
        parameters = (fc1_SHD, fc2_SDF, fc1_bias_SH, fc2_bias_SD)
        ctx.save_for_backward(x_TD, experts_TK, wide_TK, kept_RH, *parameters)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        x_TD, experts_TK, weights_TK, hidden_RH, *parameters = ctx.saved_tensors
        if hidden_RH is None:
            hidden_RH = _hidden_again(x_TD, experts_TK, ctx.experts)
        sums = ctx.experts.main_grads
        has_main = sums is not None
        if not has_main:
            sums = MainGrads.empty_for(parameters, ctx.needs_input_grad[3:7])
        grad_x_TD, grad_weights_TK = gradients(
            grad_TD.contiguous(), x_TD, experts_TK, weights_TK, hidden_RH, ctx.experts, sums
        )
        sums.is_empty = False
        grads = (None,) * 4 if has_main else sums.totals
        return grad_x_TD, None, grad_weights_TK.to(ctx.weights_dtype), *grads, None, None


def _hidden_again(x_TD: Tensor, experts_TK: Tensor, experts: ExpertWeights) -> Tensor:
    """Compute fc1's output of each row again, without the expert outputs."""
    functions = functions_for(x_TD)
    assert functions is not None, "forward ran on these kernels"
    hidden_RH = x_TD.new_empty(experts_TK.numel(), experts.fc1_SHD.shape[1])
    arguments, _slots = expert_arguments(x_TD, experts_TK, experts, None, None, hidden_RH)
    functions.moeyard_expert_forward(ctypes.byref(arguments))
    return hidden_RH


def forward_kept(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights
) -> tuple[Tensor, Tensor]:
    """Return y, and what fc1 gave for each row, ``[R, H]`` in expert order, for backward.

    ``experts_TK`` is int32 and ``weights_TK`` fp32, both contiguous.
    """
    functions = functions_for(x_TD, is_backward_ours=True)
    assert functions is not None, "can_train was not asked"
    hidden_RH = x_TD.new_empty(experts_TK.numel(), experts.fc1_SHD.shape[1])
    lines_RD = empty_fp32(experts_TK.numel(), x_TD.shape[1])
    arguments, _slots = expert_arguments(x_TD, experts_TK, experts, None, lines_RD, hidden_RH)
    wrong = functions.moeyard_expert_forward(ctypes.byref(arguments))
    check_rows(wrong, experts_TK, experts)
    return combine_lines(lines_RD, experts_TK, weights_TK, x_TD), hidden_RH


def gradients(
    grad_TD: Tensor,
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    hidden_RH: Tensor,
    experts: ExpertWeights,
    sums: MainGrads,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the routing weights; the parameters' go to ``sums``.

    ``sums`` are all fp32; or all of x's type and still empty, so that each is rounded once.
    """
    functions = functions_for(x_TD, grad_TD, is_backward_ours=True)
    assert functions is not None, "forward ran on these kernels"
    lines_RD = empty_fp32(experts_TK.numel(), x_TD.shape[1])
    grad_weights_TK = empty_fp32(*weights_TK.shape)
    forward, _slots = expert_arguments(x_TD, experts_TK, experts, None, lines_RD, hidden_RH)
    types = {total.dtype for total in sums.totals if total is not None} or {torch.float32}
    assert types == {torch.float32} or (types == {x_TD.dtype} and sums.is_empty), "wrong sums"
    arguments = ExpertGradArguments(
        forward=forward,
        grad=grad_TD.data_ptr(),
        weights=weights_TK.data_ptr(),
        is_empty=sums.is_empty,
        num_slots=experts.num_slots,
        grad_type=TYPES[types.pop()],
        grad_fc1=address(sums.fc1_SHD),
        grad_fc2=address(sums.fc2_SDF),
        grad_fc1_bias=address(sums.fc1_bias_SH),
        grad_fc2_bias=address(sums.fc2_bias_SD),
        grad_weights=grad_weights_TK.data_ptr(),
    )
    functions.moeyard_expert_grads(ctypes.byref(arguments))
    return combine_lines(lines_RD, experts_TK, None, x_TD), grad_weights_TK
