"""Assignments of rows to columns with the largest sum of scores: exact (scipy), and soft.

T tokens, E experts.
"""

import torch
from torch import Tensor

LARGE = 1e30
"""Stands for infinite scores."""


def best_assignment(scores: Tensor) -> Tensor:
    """Return int64: the column of each row, no column twice, so that the scores' sum is largest.

    There are at least as many columns as rows. Solved on the host (Jonker-Volgenant), in time that
    grows with the cube of the size.
    """
    from scipy.optimize import linear_sum_assignment  # a third of a second, for few routers

    # scipy refuses NaN. Their weights are NaN too, which the trainer reports in its own words.
    finite = scores.detach().double().nan_to_num(nan=0.0, posinf=LARGE, neginf=-torch.inf)
    _, columns = linear_sum_assignment(finite.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(scores.device)


def balanced_assignment(scores_TE: Tensor) -> Tensor:
    """Return int64 ``[T]``: each row's expert, so that the scores' sum is largest.

    Every expert gets ``T // E`` rows, or one more. Scores are rounded to a millionth of the
    largest: the rows of a repeated token differ by rounding only, and must not be told apart by it.
    """
    num_rows, num_experts = scores_TE.shape
    if num_rows == 0:
        return torch.empty(0, dtype=torch.int64, device=scores_TE.device)
    least, more = divmod(num_rows, num_experts)
    scores_TE = scores_TE.detach().double().nan_to_num(nan=0.0, posinf=LARGE, neginf=-LARGE)
    steps = 2.0 ** (20 - scores_TE.abs().max().frexp().exponent)  # of a power of two: no rounding
    scores_TE = (scores_TE * steps).round()
    if more == 0:
        places = scores_TE.repeat(1, least)
    else:
        # Every expert has a place that may stay free: rows that do not exist take E - more of
        # them, and no other place.
        idle = scores_TE.new_zeros(num_experts - more, num_experts)
        forbidden = idle.new_full((len(idle), num_experts * least), -torch.inf)
        places = torch.cat((scores_TE.repeat(1, least), scores_TE), dim=1)
        places = torch.cat((places, torch.cat((forbidden, idle), dim=1)))
    return best_assignment(places)[:num_rows] % num_experts


def sinkhorn(logits_EE: Tensor, iterations: int) -> Tensor:
    """Return ``exp(logits)`` after its rows and columns were divided by their sums in turn."""
    for _ in range(iterations):
        logits_EE = logits_EE - logits_EE.logsumexp(dim=1, keepdim=True)
        logits_EE = logits_EE - logits_EE.logsumexp(dim=0, keepdim=True)
    return logits_EE.exp()
