"""Token rounding: each expert gets a multiple of a tile's rows, so that no tile is partly empty.

It changes the model slightly, and only in training (SonicMoE; evaluate with plain top-k). An expert
drops its weakest rows or takes the best of the tokens that did not choose it, whichever is less. So
a token may visit fewer or more than K experts.

T tokens, E experts, K choices, M rows of a tile, A rows that an expert may take, B drop.
X = K + EXTRA_CHOICES (K + 1 where there is one expert).
"""

import torch
from torch import Tensor

EXTRA_CHOICES = 2
"""Experts that may take a token in addition to those it chose.

If counts are spread evenly between two multiples, E M / (8 T) experts take a token on average. So
few tokens are taken by a third expert; it drops rows instead.
"""

EPSILON = 1e-20
"""Keeps a weight finite if all chosen scores are zero."""


def round_tokens(
    experts_TK: Tensor, weights_TK: Tensor, scores_TE: Tensor, tile_rows: int
) -> tuple[Tensor, Tensor]:
    """Return experts and weights, ``[T, X]``, with a multiple of ``tile_rows`` rows per expert.

    The nearest multiple, or the one below if there are too few tokens or no columns left. Dropped
    choices become -1 with weight 0. The last columns hold added choices, whose scores become
    weights like those of chosen experts. Tokens without any choice get none. ``experts_TK`` must
    not repeat an expert in a row. Does not wait for the device.
    """
    with torch.no_grad():
        weights_TE, chosen_TE = _by_expert(experts_TK, weights_TK, scores_TE.shape[1])
        added_TX, dropped_TE = _plan(weights_TE, chosen_TE, scores_TE, tile_rows)
    kept_TK = ~dropped_TE.gather(1, experts_TK.clamp(min=0).long())
    return _exchange(experts_TK, weights_TK, scores_TE, kept_TK, added_TX)


def replay_rounding(
    experts_TK: Tensor, weights_TK: Tensor, scores_TE: Tensor, given_TX: Tensor
) -> tuple[Tensor, Tensor]:
    """Return experts and weights of a recorded rounding, ``given_TX``, instead of a new one.

    ``experts_TK`` are the choices before it. They are dropped where ``given_TX`` has -1. The
    columns behind them are added.
    """
    k = experts_TK.shape[1]
    kept_TK, added_TX = given_TX[:, :k] >= 0, given_TX[:, k:].long()
    return _exchange(experts_TK, weights_TK, scores_TE, kept_TK, added_TX)


def _exchange(
    experts_TK: Tensor, weights_TK: Tensor, scores_TE: Tensor, kept_TK: Tensor, added_TX: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the choices that are kept and behind them those added, and the weights of both."""
    present_TK, ids_TK = experts_TK >= 0, experts_TK.clamp(min=0).long()
    kept_TK = present_TK & kept_TK
    total_T1 = torch.where(present_TK, weights_TK, 0).sum(dim=1, keepdim=True)
    chosen_score_TK = torch.where(present_TK, scores_TE.gather(1, ids_TK), 0)
    factor_T1 = total_T1 / (chosen_score_TK.sum(dim=1, keepdim=True) + EPSILON)
    added_score_TX = factor_T1 * scores_TE.gather(1, added_TX.clamp(min=0))
    experts_TX = torch.cat((torch.where(kept_TK, experts_TK, -1), added_TX.to(experts_TK)), dim=1)
    weights_TX = torch.cat(
        (torch.where(kept_TK, weights_TK, 0), torch.where(added_TX >= 0, added_score_TX, 0)), dim=1
    )
    return experts_TX, weights_TX


def _by_expert(experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the weight of each pair, infinite if it is not chosen, and which are chosen."""
    columns_TK = torch.where(experts_TK >= 0, experts_TK, num_experts).long()
    weights_TE = weights_TK.new_full((len(experts_TK), num_experts + 1), torch.inf)
    weights_TE = weights_TE.scatter(1, columns_TK, weights_TK)[:, :num_experts]
    return weights_TE, weights_TE < torch.inf


def _plan(
    weights_TE: Tensor, chosen_TE: Tensor, scores_TE: Tensor, tile_rows: int
) -> tuple[Tensor, Tensor]:
    """Return the experts that each token is added to, -1 for none, and which pairs are dropped."""
    counts_E, valid_T = chosen_TE.sum(dim=0), chosen_TE.any(dim=1)
    over_E = counts_E % tile_rows
    below_E = counts_E - over_E
    goes_up_E = (2 * over_E >= tile_rows) & (below_E + tile_rows <= valid_T.sum())
    missing_E = torch.where(goes_up_E, tile_rows - over_E, 0)
    free_TE = ~chosen_TE & valid_T.unsqueeze(1)
    wanted_TE = _best(torch.where(free_TE, scores_TE, -torch.inf), missing_E, tile_rows // 2)
    # If more experts want a token than it has columns for, those with the lowest scores lose.
    offers_TE = torch.where(wanted_TE, scores_TE, -torch.inf)
    places = min(EXTRA_CHOICES, scores_TE.shape[1])
    added_TX = offers_TE.topk(places, dim=1).indices
    has_place_TE = torch.zeros_like(wanted_TE).scatter(1, added_TX, True)
    goes_up_E &= ~(wanted_TE & ~has_place_TE).any(dim=0)
    is_added_TX = (wanted_TE & goes_up_E).gather(1, added_TX)
    surplus_E = torch.where(goes_up_E, 0, over_E)
    dropped_TE = _best(-weights_TE, surplus_E, tile_rows - 1)
    return torch.where(is_added_TX, added_TX, -1), dropped_TE


def _best(values_TE: Tensor, counts_E: Tensor, most: int) -> Tensor:
    """Return True for the ``counts_E`` largest values of each column, ``most`` at most."""
    most = min(most, len(values_TE))
    places_AE = torch.arange(most, device=values_TE.device).unsqueeze(1)
    tokens_AE = values_TE.topk(most, dim=0).indices
    return torch.zeros_like(values_TE, dtype=torch.bool).scatter(0, tokens_AE, places_AE < counts_E)
