"""Prune one expert so that its outputs on its rows change little.

n rows of the expert, D model width, F expert width, H rows of fc1 (2F with a gate).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.values.activation import Activation, gated
from ...kernels.values.fit_groups import fit_groups
from ...kernels.values.group_sparse import GroupSparseView, widened
from ...kernels.values.sparsify import sparsify

DAMPING = 0.01
"""Share of a Hessian's mean diagonal that is added to it, as GPTQ does."""


Views = tuple[GroupSparseView, GroupSparseView]
"""fc1 and fc2."""


class Expert(NamedTuple):
    """The exact weights of an expert, in fp32."""

    fc1_HD: Tensor
    fc2_DF: Tensor
    fc1_bias_H: Tensor | None
    activation: Activation

    def hidden(self, x_nD: Tensor, fc1_HD: Tensor | None = None) -> Tensor:
        """Return what fc2 reads, ``[n, F]``; with another fc1 if it is given."""
        weight_HD = self.fc1_HD if fc1_HD is None else fc1_HD
        return gated(F.linear(x_nD, weight_HD, self.fc1_bias_H), self.activation)


class ExpertRows(NamedTuple):
    """The rows that chose an expert."""

    x_nD: Tensor
    share_n1: Tensor
    """Their routing weights."""
    wanted_nD: Tensor
    """What the expert should add to the layer's output, its second bias left out."""


def fit_expert(expert: Expert, rows: ExpertRows, kept: tuple[int, int]) -> Views:
    """Return fc1 and fc2 pruned to ``kept`` groups a row, in closed form.

    fc1 keeps what it makes of the rows, weighted by their shares. fc2 is then fitted to what is
    wanted, on the hidden rows of the pruned fc1.
    """
    x_nD, share_n1, wanted_nD = rows
    weighted_nD = x_nD * share_n1
    fc1 = fit_groups(expert.fc1_HD, damped(weighted_nD.T @ weighted_nD), kept[0])
    hidden_nF = expert.hidden(x_nD, widened(fc1, torch.float32)) * share_n1
    plain_FF = hidden_nF.T @ hidden_nF
    hessian_FF = damped(plain_FF)
    # Damping pulls the fit to the exact weights, and so does a direction without rows.
    wanted_FD = hidden_nF.T @ wanted_nD + (hessian_FF - plain_FF) @ expert.fc2_DF.T
    ideal_FD = torch.cholesky_solve(wanted_FD, torch.linalg.cholesky(hessian_FF))
    return fc1, fit_groups(ideal_FD.T.contiguous(), hessian_FF, kept[1])


def prune_plainly(expert: Expert, x_nD: Tensor, kept: tuple[int, int]) -> Views:
    """Return fc1 and fc2 pruned by the mean squares of their inputs, and nothing else."""
    inputs_D = x_nD.square().mean(dim=0)
    hidden_F = expert.hidden(x_nD).square().mean(dim=0)
    return sparsify(expert.fc1_HD, inputs_D, kept[0]), sparsify(expert.fc2_DF, hidden_F, kept[1])


def pruned_output(expert: Expert, rows: ExpertRows, views: Views) -> Tensor:
    """Return what the pruned expert adds to the layer's output, as ``wanted_nD``."""
    fc1_HD, fc2_DF = (widened(view, torch.float32) for view in views)
    return (expert.hidden(rows.x_nD, fc1_HD) * rows.share_n1) @ fc2_DF.T


def damped(hessian_PP: Tensor) -> Tensor:
    """Return a positive definite Hessian."""
    mean = float(hessian_PP.diagonal().mean())
    return hessian_PP + max(DAMPING * mean, 1e-12) * torch.eye(len(hessian_PP))
