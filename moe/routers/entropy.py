"""The entropy of tokens' choices as a loss: low where a token is sure of its experts.

T tokens, E experts.
"""

import torch
from torch import Tensor

from ...kernels.values.choice import ChoiceRule
from .loss_terms import GlobalCounts, training_sum
from .routing import Routing


def add_entropy(
    routing: Routing, logits_TE: Tensor, valid_T: Tensor | None, rule: ChoiceRule
) -> None:
    """Store ``-sum_e p log p`` in nats, summed over valid rows, with p the scores over their sum.

    From logits: logarithms of scores that have become 0 would be infinite.
    """
    if rule.score == "sigmoid":
        logits_TE = torch.nn.functional.logsigmoid(logits_TE)
    logs_TE = logits_TE.log_softmax(dim=-1)
    entropy_T = -(logs_TE.exp() * logs_TE).sum(dim=-1)
    if valid_T is not None:
        entropy_T = torch.where(valid_T, entropy_T, 0)
    routing.extras["entropy_sum"] = entropy_T.sum()


def mean_entropy(routing: Routing, counts: GlobalCounts) -> Tensor:
    """Return this rank's share of the mean over the tokens of the global batch."""
    return training_sum(routing, "entropy_sum") / counts.num_tokens.clamp(min=1)
