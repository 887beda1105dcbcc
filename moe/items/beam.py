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

        Row r continues row ``parents_R[r]`` of the call before, which is of the same user, by the
        tokens ``tokens_RT[r]``. In the first call each row is its own parent. The rows of a user
        are neighbours.
        """
        ...


class Sessions(NamedTuple):
    """The sessions of the beams of each user, best first."""

    items_BWI: Tensor
    """int64: places of the items in the table."""
    log_probs_BW: Tensor
    """fp64: the log-probability of a session's tokens; ``-inf`` where there are fewer sessions than
    beams, and such a session does not count."""

    def best_items(self, user: int, count: int) -> list[int]:
        """Return the first ``count`` different items of a user's sessions, best session first."""
        items_WI = self.items_BWI[user][~self.log_probs_BW[user].isinf()]
        return list(dict.fromkeys(items_WI.flatten().tolist()))[:count]


@torch.no_grad()
def search(
    decode: Decode, table: ItemTable, num_users: int, num_items: int, num_beams: int
) -> Sessions:
    """Return the likeliest sessions of ``num_items`` items that a beam search finds.

    Only ids of items are generated. An id that several items share may be used as often as it has
    items. A beam of 1 takes the likeliest code each time. The decoder is called
    ``num_items * num_levels`` times, with ``num_users * num_beams`` rows, whatever it answers.
    There must be as many items as a session has.
    """
    assert num_items <= len(table), "the caller checks it"
    trie, num_rows = table.trie, num_users * num_beams
    nodes_R = torch.full((num_rows,), Trie.root)
    used_RU = torch.empty(num_rows, 0, dtype=torch.int64)
    way_RN = torch.empty(num_rows, 0, dtype=torch.int64)  # nodes of the item under way
    tokens_RT = torch.full((num_rows, 1), table.begin)
    parents_R = torch.arange(num_rows)
    scores_BW = torch.full((num_users, num_beams), -torch.inf, dtype=torch.float64)
    scores_BW[:, 0] = 0  # the beams of a user begin alike, and one of them counts
    firsts_B1 = torch.arange(num_users)[:, None] * num_beams
    for place in range(num_items * table.num_levels):
        level = place % table.num_levels
        codes = slice(level * table.num_codes, (level + 1) * table.num_codes)
        logits_RV = decode(tokens_RT, parents_R).cpu()
        log_probs_RK = logits_RV.double().log_softmax(dim=1)[:, codes]
        open_RK = trie.remaining(nodes_R, used_RU) > 0
        sums_RK = scores_BW.reshape(-1, 1) + log_probs_RK.masked_fill(~open_RK, -torch.inf)
        sums_BC = sums_RK.reshape(num_users, num_beams * table.num_codes)
        scores_BW, choices_BW = sums_BC.topk(num_beams, dim=1)
        parents_R = (firsts_B1 + choices_BW // table.num_codes).reshape(-1)
        codes_R = (choices_BW % table.num_codes).reshape(-1)
        # A beam that does not count goes any way that is open, so that the others need not know.
        some_R = open_RK[parents_R].long().argmax(dim=1)
        codes_R = torch.where(scores_BW.reshape(-1).isinf(), some_R, codes_R)
        nodes_R = trie.child(nodes_R[parents_R], codes_R)
        way_RN = torch.cat([way_RN[parents_R], nodes_R[:, None]], dim=1)
        used_RU, tokens_RT = used_RU[parents_R], (codes_R + codes.start)[:, None]
        if level == table.num_levels - 1:
            used_RU, way_RN = torch.cat([used_RU, way_RN], dim=1), way_RN[:, :0]
            nodes_R = torch.full_like(nodes_R, Trie.root)
            tokens_RT = torch.cat([tokens_RT, torch.full_like(tokens_RT, table.begin)], dim=1)
    leaves_RI = used_RU[:, table.num_levels - 1 :: table.num_levels]
    items = [_items(trie, leaves_I) for leaves_I in leaves_RI.tolist()]
    items_BWI = torch.tensor(items, dtype=torch.int64).reshape(num_users, num_beams, num_items)
    return Sessions(items_BWI, scores_BW)


def _items(trie: Trie, leaves_I: list[int]) -> list[int]:
    """Return the items of a session's ids; an id that is there again stands for its next item."""
    return [trie.items(leaf)[leaves_I[:place].count(leaf)] for place, leaf in enumerate(leaves_I)]
