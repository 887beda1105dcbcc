"""Which codes may follow a prefix of codes, so that only ids of items are generated.

N items, L levels, K codes per level, R rows (prefixes), U nodes that a row has used.
"""

import torch
from torch import Tensor


class Trie:
    """The prefixes of the items' codes. A node is a prefix; node 0 is the empty one.

    A node's children are kept by the number ``node * K + code`` in order. Memory grows with the
    items, and not with K.
    """

    root = 0

    def __init__(self, codes_NL: Tensor, num_codes: int) -> None:
        self._num_codes = num_codes
        nodes_N = torch.zeros(len(codes_NL), dtype=torch.int64)
        counts, keys, first, leaves = [torch.tensor([len(codes_NL)])], [], 1, 0
        for codes_N in codes_NL.T:
            # Nodes are numbered level by level, so the keys of all levels together are in order.
            level, places_N = (nodes_N * num_codes + codes_N).unique(return_inverse=True)
            keys.append(level)
            counts.append(torch.bincount(places_N, minlength=len(level)))
            nodes_N, leaves = first + places_N, first
            first += len(level)
        self._keys_E = torch.cat(keys)
        """``parent * K + code`` of every node but the root: node n is the edge n - 1."""
        self._counts_V = torch.cat(counts)
        """Items below each node."""
        self._starts_V = torch.searchsorted(self._keys_E, torch.arange(first + 1) * num_codes)
        """The first edge of each node, and the end of the last one's."""
        self.leaves_N = nodes_N
        """The node of each item's id."""
        self._first_leaf = leaves
        self._items_N = nodes_N.argsort(stable=True)
        """The items, by leaf."""
        self._ends_F = self._counts_V[leaves:].cumsum(0)
        """The end of each leaf's items among them."""

    def remaining(self, nodes_R: Tensor, used_RU: Tensor) -> Tensor:
        """Return how many items are left below each next code of a node, int64 ``[R, K]``.

        ``used_RU`` are the nodes on the ways of the items that a row already has, an item's each
        time it is used; -1 = none.
        """
        left_RK = torch.zeros(len(nodes_R), self._num_codes, dtype=torch.int64)
        starts_R = self._starts_V[nodes_R]
        sizes_R = self._starts_V[nodes_R + 1] - starts_R
        rows_C = torch.arange(len(nodes_R)).repeat_interleave(sizes_R)
        ends_R = sizes_R.cumsum(0)
        places_C = torch.arange(len(rows_C)) - (ends_R - sizes_R - starts_R)[rows_C]
        codes_C = self._keys_E[places_C] % self._num_codes
        left_RK[rows_C, codes_C] = self._counts_V[places_C + 1]
        edges_RU = (used_RU - 1).clamp(min=0)
        is_child_RU = (used_RU > 0) & (
            self._keys_E[edges_RU] // self._num_codes == nodes_R[:, None]
        )
        codes_RU = self._keys_E[edges_RU] % self._num_codes
        return left_RK.scatter_add_(1, codes_RU, -is_child_RU.long())

    def child(self, nodes_R: Tensor, codes_R: Tensor) -> Tensor:
        """Return the node of each prefix with one code more, which must be there."""
        keys_R = nodes_R * self._num_codes + codes_R
        edges_R = torch.searchsorted(self._keys_E, keys_R)
        assert torch.equal(self._keys_E[edges_R], keys_R), "no item begins so"
        return edges_R + 1

    def items(self, leaf: int) -> list[int]:
        """Return the items whose id is a leaf, in the order of the table."""
        place = leaf - self._first_leaf
        end = int(self._ends_F[place])
        return self._items_N[end - int(self._counts_V[leaf]) : end].tolist()
