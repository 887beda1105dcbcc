"""Direct preference optimisation: the loss of pairs (Rafailov et al. 2023).

B pairs. All log-probabilities are sums over the tokens of an answer.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class DPOTerms(NamedTuple):
    """What pairs cost."""

    loss_sum: Tensor
    """Scalar: summed over pairs."""
    margins_B: Tensor
    """``beta`` times how much more the policy prefers the chosen answer than the reference does."""


def dpo_loss(
    policy_chosen_B: Tensor,
    policy_rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> DPOTerms:
    """Return ``-(1 - e) log sigmoid(z) - e log sigmoid(-z)`` with the margin z of each pair.

    ``z = beta ((policy_chosen - policy_rejected) - (reference_chosen - reference_rejected))``; e is
    ``label_smoothing``, the share of pairs that may be the wrong way round.
    """
    policy_B = policy_chosen_B - policy_rejected_B
    margins_B = beta * (policy_B - (reference_chosen_B - reference_rejected_B))
    right_B, wrong_B = F.logsigmoid(margins_B), F.logsigmoid(-margins_B)
    loss = -((1 - label_smoothing) * right_B + label_smoothing * wrong_B).sum()
    return DPOTerms(loss, margins_B)
