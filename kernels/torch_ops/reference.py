"""The expert MLP written to be obviously right; any dtype, gradients by autograd.

T tokens, K choices, E experts, F expert width, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..values.activation import gated
from ..values.calls import ExpertCall
from ..values.channel_weights import ChannelExpertWeights


def run(call: ExpertCall) -> Tensor:
    """Return ``y_t = sum_k weights[t, k] * MLP_{experts[t, k]}(x_t)``, ``[T, D]``."""
    x_TD, experts_TK, weights_TK = call.rows
    experts = call.experts
    y_TKD = x_TD.new_zeros(*experts_TK.shape, x_TD.shape[1])
    for expert in range(experts.num_experts):
        slot = experts.slot(expert)
        tokens_N, choices_N = torch.nonzero(experts_TK == expert, as_tuple=True)
        # Unused experts are computed too, so that their gradient is zero and not missing.
        if slot < 0:
            assert tokens_N.numel() == 0, f"expert {expert} has rows but no slot"
            continue
        fc1_HD, fc2_DF = experts.matrices(slot, x_TD.dtype)
        bias1_H, bias2_D = experts.biases(slot, x_TD.dtype)
        x_ND = x_TD[tokens_N]
        if isinstance(experts, ChannelExpertWeights):
            x_ND = experts.keep_x(x_ND, expert)
            hidden_NF = experts.activate(F.linear(x_ND, fc1_HD, bias1_H), expert)
        else:
            hidden_NF = gated(F.linear(x_ND, fc1_HD, bias1_H), experts.activation)
        y_ND = F.linear(hidden_NF, fc2_DF, bias2_D)
        y_TKD = y_TKD.index_put((tokens_N, choices_N), y_ND)
    present_TK = experts_TK >= 0
    weights_TK = torch.where(present_TK, weights_TK, 0)
    return (weights_TK.unsqueeze(-1) * y_TKD).sum(dim=1).to(x_TD.dtype)
