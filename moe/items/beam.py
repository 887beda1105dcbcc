"""Beam search for sessions: lists of items, of which none is there twice.

B users, W beams of each, R = B * W rows, I items of a session, L levels, K codes, V tokens.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .table import ItemTable
from .trie import Trie


class Decode(Protocol):
    """A decoder that remembers its rows."""

    def __call__(self, tokens_RT: Tensor, parents_R: Tensor) -> Tensor:
        """Return scores over the tokens that follow, ``[R, V]``.

        Row r continues row ``parents_R[r]`` of the call before by the tokens ``tokens_RT[r]``. In
        the first call the parents are the users.
        """
        ...


class Sessions(NamedTuple):
    """The sessions of the beams of each user, best first."""

    items_BWI: Tensor
    """int64: places of the items in the table."""
    log_probs_BW: Tensor
    """fp64: the log-probability of a session's tokens; ``-inf`` where there are fewer
    sessions than beams."""


@torch.no_grad()
def search(
    decode: Decode, table: ItemTable, num_users: int, num_items: int, num_beams: int
) -> Sessions:
    """Return the likeliest sessions of ``num_items`` items that a beam search finds.

    Only ids of items are generated. An id that several items share may be used as often as it has
    items. A beam of 1 takes the likeliest code each time. The decoder is called
    ``num_items * num_levels`` times, with ``num_users * num_beams`` rows at most, whatever it
    answers. There must be as many items as a session has.
    """
    assert num_items <= len(table), "the caller checks it"
    trie, width = table.trie, 1
    nodes_R = torch.full((num_users,), Trie.root)
    used_RU = torch.empty(num_users, 0, dtype=torch.int64)
    way_RN = torch.empty(num_users, 0, dtype=torch.int64)  # nodes of the item under way
    tokens_RT = torch.full((num_users, 1), table.begin)
    parents_R = torch.arange(num_users)
    scores_R = torch.zeros(num_users, dtype=torch.float64)
    for place in range(num_items * table.num_levels):
        level = place % table.num_levels
        codes = slice(level * table.num_codes, (level + 1) * table.num_codes)
        logits_RV = decode(tokens_RT, parents_R).cpu()
        wide = torch.promote_types(logits_RV.dtype, torch.float32)
        log_probs_RK = logits_RV.to(wide).log_softmax(dim=1)[:, codes]
        open_RK = trie.remaining(nodes_R, used_RU) > 0
        sums_RK = (scores_R[:, None] + log_probs_RK).masked_fill(~open_RK, -torch.inf)
        sums_BC = sums_RK.reshape(num_users, width * table.num_codes)
        next_width = min(num_beams, sums_BC.shape[1])
        best_BW, choices_BW = sums_BC.topk(next_width, dim=1)
        firsts_B1 = torch.arange(num_users)[:, None] * width
        parents_R = (firsts_B1 + choices_BW // table.num_codes).reshape(-1)
        codes_R = (choices_BW % table.num_codes).reshape(-1)
        scores_R, width = best_BW.reshape(-1), next_width
        # A beam without a session goes any way that is open, so that the others need not know.
        some_R = open_RK[parents_R].long().argmax(dim=1)
        codes_R = torch.where(scores_R.isinf(), some_R, codes_R)
        nodes_R = trie.child(nodes_R[parents_R], codes_R)
        way_RN = torch.cat([way_RN[parents_R], nodes_R[:, None]], dim=1)
        used_RU, tokens_RT = used_RU[parents_R], (codes_R + codes.start)[:, None]
        if level == table.num_levels - 1:
            used_RU, way_RN = torch.cat([used_RU, way_RN], dim=1), way_RN[:, :0]
            nodes_R = torch.full_like(nodes_R, Trie.root)
            tokens_RT = torch.cat([tokens_RT, torch.full_like(tokens_RT, table.begin)], dim=1)
    leaves_RI = used_RU[:, table.num_levels - 1 :: table.num_levels]
    items = [_items(trie, leaves_I) for leaves_I in leaves_RI.tolist()]
    items_BWI = torch.tensor(items, dtype=torch.int64).reshape(num_users, width, num_items)
    return Sessions(items_BWI, scores_R.reshape(num_users, width))


def _items(trie: Trie, leaves_I: list[int]) -> list[int]:
    """Return the items of a session's ids; an id that is there again stands for its next item."""
    return [trie.items(leaf)[leaves_I[:place].count(leaf)] for place, leaf in enumerate(leaves_I)]


def best_items(items_WI: list[list[int]], count: int) -> list[int]:
    """Return the first ``count`` different items of sessions, best session first."""
    return list(dict.fromkeys(item for session in items_WI for item in session))[:count]
