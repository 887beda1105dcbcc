"""The expert MLP whose own matrices do not train, perhaps with low-rank updates that do.

Products run expert by expert under autograd. It keeps no inputs for the gradients of matrices that
want none, and there are no weight gradients to compute: what is left are the gradients of x, of the
routing weights and of the low-rank matrices (LoRA, Hu et al. 2021: ``W x + s B (A x)``).

T tokens, K choices, R = T*K routed rows, N <= R rows whose expert is here, in expert order, n rows
of one group, perhaps rounded up, S slots, D model width, F expert width, H = 2F, P rank.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import gated
from .expert_loop import Span, _rounded, spans_of
from .expert_weights import ExpertWeights
from .grouping import group_tokens


@dataclass(frozen=True, slots=True)
class LowRank:
    """Low-rank updates of every slot; gate, up and down have an A and a B each."""

    fc1_a_S2PD: Tensor
    """A of the gate first, then of up."""
    fc1_b_SHP: Tensor
    """B of the gate first, then of up."""
    fc2_a_SPF: Tensor
    fc2_b_SDP: Tensor
    scale: float
    """s, the factor on ``B A``."""

    def slots(self) -> list["LowRank"]:
        """Return the updates slot by slot; their gradients are put together once."""
        stacked = (self.fc1_a_S2PD, self.fc1_b_SHP, self.fc2_a_SPF, self.fc2_b_SDP)
        every = zip(*(tensor.unbind(0) for tensor in stacked), strict=True)
        return [LowRank(a1, b1, a2, b2, self.scale) for a1, b1, a2, b2 in every]


def frozen_expert_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    experts: ExpertWeights,
    low_rank: LowRank | None = None,
) -> Tensor:
    """Return ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, ``[T, D]`` in x's dtype.

    As :func:`..expert_mlp.expert_mlp`, but differentiable in x, the weights and ``low_rank`` only.
    Sums have one order, without atomics. The result has a graph wherever an argument wants
    gradients, even where no row came, so that all ranks go through the same backward. Raises
    ``ValueError`` for expert ids out of range.
    """
    num_choices = experts_TK.shape[1]
    grouping = group_tokens(experts_TK, experts.num_experts)
    spans = spans_of(grouping, experts) or [Span(0, 0, 0)]  # no rows: still a graph
    updates = None if low_rank is None else low_rank.slots()
    # One line per routed row first, so that backward sums each token's lines in order of k.
    x_RD = x_TD.unsqueeze(1).expand(-1, num_choices, -1).reshape(-1, x_TD.shape[1])
    x_ND = x_RD.index_select(0, grouping.order_R[: spans[-1].end])
    groups = []
    for slot, start, end in spans:
        update = None if updates is None else updates[slot]
        # In few numbers of rows where code is compiled for each (kernels/expert_loop.py).
        num_rows = end - start
        x_nD = F.pad(x_ND[start:end], (0, 0, 0, _rounded(num_rows, x_TD) - num_rows))
        groups.append(_one_expert(x_nD, experts, slot, update)[:num_rows])
    # Rows without an expert read a line of zeros behind the last.
    y_ND = torch.cat([*groups, x_TD.new_zeros(1, x_TD.shape[1])])
    lines_R = grouping.inverse_R.clamp(max=spans[-1].end)
    y_TKD = y_ND.index_select(0, lines_R).unflatten(0, (-1, num_choices))
    weights_TK = torch.where(experts_TK >= 0, weights_TK, 0)
    return (weights_TK.unsqueeze(-1) * y_TKD).sum(dim=1).to(x_TD.dtype)


def _one_expert(x_nD: Tensor, experts: ExpertWeights, slot: int, update: LowRank | None) -> Tensor:
    parts = (*experts.matrices(slot, x_nD.dtype), *experts.biases(slot, x_nD.dtype))
    fc1_HD, fc2_DF, fc1_bias_H, fc2_bias_D = (
        None if part is None else part.detach() for part in parts
    )
    assert fc1_HD is not None and fc2_DF is not None, "only biases may be missing"
    h_nH = F.linear(x_nD, fc1_HD, fc1_bias_H)
    if update is not None:
        gate_nP, up_nP = F.linear(x_nD, update.fc1_a_S2PD).chunk(2, dim=-1)
        gate_b_FP, up_b_FP = update.fc1_b_SHP.chunk(2)
        both = (F.linear(gate_nP, gate_b_FP), F.linear(up_nP, up_b_FP))
        h_nH = h_nH + update.scale * torch.cat(both, dim=-1)
    act_nF = gated(h_nH, experts.activation)
    y_nD = F.linear(act_nF, fc2_DF, fc2_bias_D)
    if update is not None:
        low_nP = F.linear(act_nF, update.fc2_a_SPF)
        y_nD = y_nD + update.scale * F.linear(low_nP, update.fc2_b_SDP)
    return y_nD
