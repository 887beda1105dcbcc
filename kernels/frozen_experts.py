"""The expert MLP with frozen matrices and trainable low-rank updates.

The update of a matrix W is ``s B A`` (LoRA, Hu et al. 2021): ``W x + s B (A x)``. Products run
grouped by expert under autograd, and inputs are not kept for frozen matrices.

T tokens, K choices, R = T*K routed rows, N <= R rows whose expert is here, in expert order,
S slots, D model width, F expert width, H = 2F, P rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .grouped_linear import grouped_linear
from .torch_ops.loop import Span, spans_of
from .values.activation import gated
from .values.expert_weights import ExpertWeights
from .values.grouping import group_tokens


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


def frozen_expert_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    experts: ExpertWeights,
    low_rank: LowRank,
) -> Tensor:
    """Return ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, ``[T, D]`` in x's dtype.

    Like :func:`.experts.expert_mlp`, but differentiable in x, the weights and ``low_rank`` only.
    Sums have one order, without atomics. The result has a graph if any argument requires
    gradients, even without rows, so that all ranks run the same backward. Raises
    ``ValueError`` for expert ids out of range.
    """
    num_choices = experts_TK.shape[1]
    grouping = group_tokens(experts_TK, experts.num_experts)
    spans = spans_of(grouping, experts)
    num_rows = spans[-1].end if spans else 0
    # One line per routed row first, so that backward sums each token's lines in order of k.
    x_RD = x_TD.unsqueeze(1).expand(-1, num_choices, -1).reshape(-1, x_TD.shape[1])
    y_ND = _experts(x_RD.index_select(0, grouping.order_R[:num_rows]), experts, spans, low_rank)
    # Rows without an expert read a line of zeros after the last row.
    y_ND = torch.cat([y_ND, x_TD.new_zeros(1, x_TD.shape[1])])
    lines_R = grouping.inverse_R.clamp(max=num_rows)
    y_TKD = y_ND.index_select(0, lines_R).unflatten(0, (-1, num_choices))
    weights_TK = torch.where(experts_TK >= 0, weights_TK, 0)
    return (weights_TK.unsqueeze(-1) * y_TKD).sum(dim=1).to(x_TD.dtype)


def _experts(x_ND: Tensor, experts: ExpertWeights, spans: list[Span], update: LowRank) -> Tensor:
    d_expert = experts.fc2_SDF.shape[2]
    h_NH = grouped_linear(x_ND, experts.fc1_SHD.detach(), spans)
    if experts.bias_parts:
        slots_N = _slots_N(spans, x_ND)
        fc1_bias_SH, fc2_bias_SD = (bias.detach().to(x_ND.dtype) for bias in experts.bias_parts)
        h_NH = h_NH + fc1_bias_SH.index_select(0, slots_N)
    gate_NP, up_NP = grouped_linear(x_ND, update.fc1_a_S2PD, spans).chunk(2, dim=-1)
    gate_NF = grouped_linear(gate_NP, update.fc1_b_SHP[:, :d_expert], spans)
    up_NF = grouped_linear(up_NP, update.fc1_b_SHP[:, d_expert:], spans)
    h_NH = h_NH + update.scale * torch.cat((gate_NF, up_NF), dim=-1)
    act_NF = gated(h_NH, experts.activation)
    y_ND = grouped_linear(act_NF, experts.fc2_SDF.detach(), spans)
    if experts.bias_parts:
        y_ND = y_ND + fc2_bias_SD.index_select(0, slots_N)
    low_NP = grouped_linear(act_NF, update.fc2_a_SPF, spans)
    return y_ND + update.scale * grouped_linear(low_NP, update.fc2_b_SDP, spans)


def _slots_N(spans: list[Span], x_ND: Tensor) -> Tensor:
    """Return the slot of every row."""
    slots, counts = [span.slot for span in spans], [span.end - span.start for span in spans]
    device = x_ND.device
    slots_n = torch.tensor(slots, dtype=torch.int64, device=device)
    counts_n = torch.tensor(counts, dtype=torch.int64, device=device)
    return slots_n.repeat_interleave(counts_n, output_size=len(x_ND))
