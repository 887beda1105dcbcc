"""Prune groups of a matrix and round the others, so that its outputs change little.

The error of a matrix is ``(w - ideal) H (w - ideal)^T``, summed over its rows, where H is the sum
of ``x x^T`` over the rows x that it will multiply: the squared change of its outputs. What stays
makes up for what goes, as in Optimal Brain Surgeon (Hassibi et al. 1993) and SparseGPT (Frantar and
Alistarh 2023). Those update weights by the inverse of H, of which each row of a matrix would need
another, since its groups are others. Conjugate gradients need H alone and give the same minimum.

Q outputs and P inputs of a matrix, C = P / GROUP, N groups that a row keeps, G inputs of a group.
"""

import torch
from torch import Tensor

from .few_bits import INT4_ZERO
from .group_sparse import GROUP, GroupSparseView, column_type
from .quantize import best_int4_scales, rounded

ROUNDS = 4
"""In which groups are pruned, with a fit between them: what a group is worth depends on which
others are left."""
STEPS, FEW_STEPS = 24, 8
"""Of conjugate gradients, for the last fit and for those between rounds."""
SWEEPS = 2
"""Over all inputs, in which each value moves to the best multiple of its scale."""


def fit_groups(ideal_QP: Tensor, hessian_PP: Tensor, kept: int) -> GroupSparseView:
    """Return a matrix with ``kept`` groups in each row and a small error.

    ``hessian_PP`` is H above in fp32, positive definite. Deterministic.
    """
    is_kept_QC = best_groups(ideal_QP, hessian_PP, kept)
    fitted_QP = refitted(ideal_QP, hessian_PP, is_kept_QC)
    columns_QN = is_kept_QC.nonzero()[:, 1].view(len(ideal_QP), kept)
    index_QNG = columns_QN.unsqueeze(-1).expand(-1, -1, GROUP)
    kept_QNG = fitted_QP.unflatten(-1, (-1, GROUP)).gather(1, index_QNG)
    importance_CG = hessian_PP.diagonal().unflatten(0, (-1, GROUP))
    largest_QN1 = kept_QNG.abs().amax(dim=-1, keepdim=True)
    scales_QN1 = best_int4_scales(kept_QNG, largest_QN1 / 7, importance_CG[columns_QN])
    scales_QC1 = scales_QN1.new_zeros(*is_kept_QC.shape, 1)
    scales_QC1.scatter_(1, columns_QN.unsqueeze(-1), scales_QN1)
    values_QP = best_values(fitted_QP, scales_QC1.squeeze(-1), ideal_QP, hessian_PP)
    values_QNG = values_QP.unflatten(-1, (-1, GROUP)).gather(1, index_QNG)
    return packed_groups(values_QNG, columns_QN, scales_QN1.squeeze(-1), ideal_QP.shape[1])


def best_groups(ideal_QP: Tensor, hessian_PP: Tensor, kept: int) -> Tensor:
    """Return which groups of each row to keep, bool ``[Q, C]``."""
    groups = ideal_QP.shape[1] // GROUP
    # The error of pruning a group for which all others make up: w_g ([H^-1]_gg)^-1 w_g.
    inverse_PP = torch.cholesky_inverse(torch.linalg.cholesky(hessian_PP))
    inverse_CGG = torch.stack(
        [inverse_PP[at : at + GROUP, at : at + GROUP] for at in range(0, len(inverse_PP), GROUP)]
    )
    price_CGG = torch.linalg.inv(inverse_CGG)
    is_kept_QC = torch.ones(len(ideal_QP), groups, dtype=torch.bool)
    weight_QP = ideal_QP
    for number in range(ROUNDS):
        left = groups - (groups - kept) * (number + 1) // ROUNDS
        grouped_QCG = weight_QP.unflatten(-1, (-1, GROUP))
        worth_QC = torch.einsum("qcg,cgh,qch->qc", grouped_QCG, price_CGG, grouped_QCG)
        worth_QC = worth_QC.masked_fill(~is_kept_QC, -1)
        order_QC = worth_QC.argsort(dim=-1, descending=True, stable=True)
        is_kept_QC = torch.zeros_like(is_kept_QC).scatter_(1, order_QC[:, :left], True)
        if left > kept:
            weight_QP = refitted(ideal_QP, hessian_PP, is_kept_QC, FEW_STEPS)
    return is_kept_QC


def refitted(
    ideal_QP: Tensor, hessian_PP: Tensor, is_kept_QC: Tensor, steps: int = STEPS
) -> Tensor:
    """Return the weights with the smallest error whose pruned groups are zero."""
    mask_QP = is_kept_QC.repeat_interleave(GROUP, dim=1)
    inverse_P = 1 / hessian_PP.diagonal()
    weight_QP = ideal_QP * mask_QP
    left_QP = ((ideal_QP - weight_QP) @ hessian_PP) * mask_QP
    ahead_QP = left_QP * inverse_P
    way_QP, size_Q1 = ahead_QP, (left_QP * ahead_QP).sum(dim=1, keepdim=True)
    for _ in range(steps):
        pushed_QP = (way_QP @ hessian_PP) * mask_QP
        bend_Q1 = (way_QP * pushed_QP).sum(dim=1, keepdim=True)
        step_Q1 = torch.where(bend_Q1 > 0, size_Q1 / bend_Q1, 0)
        weight_QP = weight_QP + step_Q1 * way_QP
        left_QP = left_QP - step_Q1 * pushed_QP
        ahead_QP = left_QP * inverse_P
        next_Q1 = (left_QP * ahead_QP).sum(dim=1, keepdim=True)
        way_QP = ahead_QP + torch.where(size_Q1 > 0, next_Q1 / size_Q1, 0) * way_QP
        size_Q1 = next_Q1
    return weight_QP


def best_values(
    weight_QP: Tensor, scales_QC: Tensor, ideal_QP: Tensor, hessian_PP: Tensor
) -> Tensor:
    """Return integers from -7 to 7 whose multiples of the scales have a small error.

    Each input in turn makes up for the rounding of all others (coordinate descent). Groups with a
    scale of 0 stay 0.
    """
    values_QP = rounded(weight_QP.unflatten(-1, (-1, GROUP)), scales_QC.unsqueeze(-1), 7).flatten(
        -2
    )
    slope_QP = (values_QP * scales_QC.repeat_interleave(GROUP, dim=1) - ideal_QP) @ hessian_PP
    for _ in range(SWEEPS):
        for group, scales_Q in enumerate(scales_QC.unbind(dim=1)):
            place = slice(group * GROUP, (group + 1) * GROUP)
            before_QG = values_QP[:, place]
            after_QG = _moved(before_QG, scales_Q, slope_QP[:, place], hessian_PP[place, place])
            slope_QP += ((after_QG - before_QG) * scales_Q.unsqueeze(1)) @ hessian_PP[place]
            values_QP[:, place] = after_QG
    return values_QP


def _moved(values_QG: Tensor, scales_Q: Tensor, slope_QG: Tensor, hessian_GG: Tensor) -> Tensor:
    """Return the values of a group after each has moved once."""
    values_GQ, slope_GQ = values_QG.T.contiguous(), slope_QG.T.contiguous()
    inverse_Q = torch.where(scales_Q > 0, 1 / scales_Q, 0)
    for i, hessian_G in enumerate(hessian_GG):
        ideal_Q = values_GQ[i] - slope_GQ[i] * inverse_Q / hessian_G[i]
        value_Q = ideal_Q.round().clamp(-7, 7)
        slope_GQ += hessian_G.unsqueeze(1) * ((value_Q - values_GQ[i]) * scales_Q)
        values_GQ[i] = value_Q
    return values_GQ.T


def packed_groups(
    values_QNG: Tensor, columns_QN: Tensor, scales_QN: Tensor, width: int
) -> GroupSparseView:
    """Return integers from -7 to 7 as they are stored."""
    values_QP = (values_QNG.flatten(-2) + INT4_ZERO).to(torch.uint8)
    packed_QB = values_QP[:, ::2] | values_QP[:, 1::2] << 4
    columns_QN = columns_QN.to(column_type(width))
    return GroupSparseView(packed_QB, columns_QN, scales_QN.bfloat16(), width)
