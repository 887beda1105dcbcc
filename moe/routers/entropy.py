"""The entropy of tokens' choices as a loss: low where a token is sure of its experts.

T tokens, E experts.
"""

import torch
from torch import Tensor

from ...kernels.values.choice import ChoiceRule


def entropy_sum(logits_TE: Tensor, valid_T: Tensor | None, rule: ChoiceRule) -> Tensor:
    """Return ``-sum_e p log p`` in nats, summed over valid rows, with p the scores over their sum.

    From logits: logarithms of scores that have become 0 would be infinite.
    """
    if rule.score == "sigmoid":
        logits_TE = torch.nn.functional.logsigmoid(logits_TE)
    logs_TE = logits_TE.log_softmax(dim=-1)
    entropy_T = -(logs_TE.exp() * logs_TE).sum(dim=-1)
    if valid_T is not None:
        entropy_T = torch.where(valid_T, entropy_T, 0)
    return entropy_T.sum()
