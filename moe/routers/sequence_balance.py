"""The balance loss over each sequence (DeepSeek-V3, section 2.1.2).

T tokens, E experts, K choices, B sequences.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.values.choice import ChoiceRule, probabilities, scores, where_valid
from ...kernels.values.memory import to_device
from .loss_terms import GlobalCounts, training_sum
from .routing import RouterInput, Routing


def add_sequence_balance(
    routing: Routing, logits_TE: Tensor, router_input: RouterInput, rule: ChoiceRule
) -> None:
    """Store in ``routing`` the summed loss of this rank's sequences, and their number.

    Eq. 18 counts the best scores without bias and groups: a bias that evens the load must not hide
    the imbalance within the sequence.
    """
    valid_T = router_input.valid_T
    scores_TE = probabilities(scores(logits_TE, rule), valid_T, rule)
    best_TK = where_valid(valid_T, scores_TE.topk(rule.k, dim=-1).indices)
    lengths = router_input.lengths or (len(scores_TE),)
    total, num_sequences = sequence_balance(scores_TE, best_TK, lengths)
    routing.extras["sequence_balance_sum"] = total
    routing.extra_counts["num_sequences"] = num_sequences


def mean_sequence_balance(routing: Routing, counts: GlobalCounts) -> Tensor:
    """Return this rank's share of the mean over the sequences of the global batch."""
    num_sequences = counts.extra["num_sequences"].clamp(min=1)
    return training_sum(routing, "sequence_balance_sum") / num_sequences


def sequence_balance(
    probabilities_TE: Tensor, best_TK: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the sum over sequences of their balance loss, and how many have valid rows.

    Per sequence of n valid tokens: ``E / (K n^2) * sum_e n_e P_e`` (DeepSeek-V3 eq. 17-20; f_e and
    P_e there are n_e E / (K n) and P_e / n). n_e counts ``best_TK``, which is -1 in invalid rows.
    ``lengths`` are the rows of each sequence, in order.
    """
    num_experts, k = probabilities_TE.shape[1], best_TK.shape[1]
    device = best_TK.device
    sequence_T = torch.arange(len(lengths), device="cpu").repeat_interleave(
        torch.tensor(lengths, device="cpu"), output_size=len(best_TK)
    )
    sequence_T = to_device(sequence_T, device)
    present_TK = best_TK >= 0
    cells_TK = sequence_T.unsqueeze(-1) * num_experts + best_TK.clamp(min=0)
    counts_BE = torch.zeros(len(lengths) * num_experts, dtype=torch.int64, device=device)
    counts_BE.scatter_add_(0, cells_TK.flatten(), present_TK.flatten().long())
    counts_BE = counts_BE.view(len(lengths), num_experts)
    valid_B = torch.zeros(len(lengths), dtype=torch.int64, device=device)
    valid_B.scatter_add_(0, sequence_T, present_TK.any(dim=-1).long())
    sums_BE = probabilities_TE.new_zeros(counts_BE.shape).index_add(0, sequence_T, probabilities_TE)
    scale_B = num_experts / (k * valid_B.clamp(min=1).to(sums_BE.dtype).square())
    return ((counts_BE * sums_BE).sum(dim=-1) * scale_B).sum(), (valid_B > 0).sum()
