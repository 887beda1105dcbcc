"""Prune whole groups of expert weights and round the others to 4 bits.

What a weight is worth is ``w^2 * h``: ``h`` is the mean square of its input on a calibration text,
the diagonal of the Hessian of the layer's squared error (as in GQSA, arXiv 2412.17560, whose
inverse Hessian we leave out, together with the training of scales).

Q outputs and P inputs of a matrix, C = P / GROUP, N groups that a row keeps, G inputs of a group.
"""

import torch
from torch import Tensor

from .expert_weights import ExpertWeights
from .few_bits import INT4_ZERO
from .group_sparse import (
    GROUP,
    GroupSparseExpertWeights,
    GroupSparseMatrices,
    GroupSparseView,
    column_type,
)
from .quantize import best_int4_scales, rounded


def kept_groups(width: int, sparsity: float) -> int:
    """Return how many groups of a row of ``width`` inputs stay: at least one.

    ``sparsity`` is the share of groups to prune, rounded to a whole number of groups.
    """
    groups = width // GROUP
    return max(1, groups - int(sparsity * groups + 0.5))


def sparsify_experts(experts: ExpertWeights, sparsity: float) -> GroupSparseExpertWeights:
    """Prune and round expert weights by their magnitudes alone, and keep their biases."""
    bias1_SH, bias2_SD = experts.fc1_bias_SH, experts.fc2_bias_SD
    return GroupSparseExpertWeights(
        sparsify_all(experts.fc1_SHD.detach(), sparsity),
        sparsify_all(experts.fc2_SDF.detach(), sparsity),
        slot_of_E=experts.slot_of_E,
        activation=experts.activation,
        fc1_bias_SH=None if bias1_SH is None else bias1_SH.detach(),
        fc2_bias_SD=None if bias2_SD is None else bias2_SD.detach(),
    )


def sparsify_all(weight_SQP: Tensor, sparsity: float) -> GroupSparseMatrices:
    """Prune and round the matrices of all slots by their magnitudes alone."""
    width = weight_SQP.shape[2]
    views = [sparsify(weight_QP, None, kept_groups(width, sparsity)) for weight_QP in weight_SQP]
    values, columns, scales = (torch.stack(part) for part in zip(*views, strict=True))
    return GroupSparseMatrices(values, columns, scales, width)


def sparsify(weight_QP: Tensor, importance_P: Tensor | None, kept: int) -> GroupSparseView:
    """Return the best ``kept`` groups of each row, rounded to 4 bits.

    ``importance_P`` is h above; None = the same for all inputs. Scales minimise the error weighted
    by it. Groups that are worth the same go in order.
    """
    grouped_QCG = weight_QP.float().unflatten(-1, (-1, GROUP))
    if importance_P is None:
        importance_P = weight_QP.new_ones(weight_QP.shape[1])
    importance_CG = importance_P.float().unflatten(-1, (-1, GROUP))
    worth_QC = (grouped_QCG.square() * importance_CG).sum(dim=-1)
    order_QC = worth_QC.argsort(dim=-1, descending=True, stable=True)
    columns_QN = order_QC[:, :kept].sort(dim=-1).values
    index_QNG = columns_QN.unsqueeze(-1).expand(-1, -1, GROUP)
    kept_QNG = grouped_QCG.gather(1, index_QNG)
    largest_QN1 = kept_QNG.abs().amax(dim=-1, keepdim=True)
    scales_QN1 = best_int4_scales(kept_QNG, largest_QN1 / 7, importance_CG[columns_QN])
    values_QP = (rounded(kept_QNG, scales_QN1, 7).flatten(-2) + INT4_ZERO).to(torch.uint8)
    packed_QB = values_QP[:, ::2] | values_QP[:, 1::2] << 4
    columns_QN = columns_QN.to(column_type(weight_QP.shape[1]))
    scales_QN = scales_QN1.squeeze(-1).bfloat16()
    return GroupSparseView(packed_QB, columns_QN, scales_QN, weight_QP.shape[1])
