"""Owners of a layer's experts such that the experts of one token lie with different owners.

A layer waits for the owner with the most of a step's experts. So what is made small is the sum over
owners of the squared number of experts that two tokens bring: pairs that one token chooses count as
often as they were seen, and pairs of two tokens as often as their loads let them meet by chance.
The first spreads experts that are chosen together, and the second balances the load.

E experts of one layer, P owners.
"""

import numpy as np
import numpy.typing as npt

Pairs = npt.NDArray[np.float64]
MOST_ROUNDS = 20
"""Passes over all experts; each pass lowers the sum or is the last."""


def spread(seen_EE: Pairs, num_tokens: int, num_owners: int) -> list[int]:
    """Return the owner of each expert.

    ``seen_EE[a, b]`` is how many of the tokens chose both; the diagonal has those that chose a.
    Owners get equally many experts, to within one. The busiest expert goes first, each to the owner
    where it adds the least to the sum; then pairs of experts change places while that lowers it.
    """
    load_E = seen_EE.diagonal()
    together_EE = seen_EE + np.outer(load_E, load_E) / max(1, num_tokens)
    num_experts = len(together_EE)
    room = [-(-(num_experts - owner) // num_owners) for owner in range(num_owners)]
    owner_E = np.full(num_experts, -1)
    # What an expert shares with the experts of each owner.
    shared_EP = np.zeros((num_experts, num_owners))
    for expert in np.argsort(-load_E, kind="stable"):
        open_owners = [owner for owner in range(num_owners) if room[owner]]
        owner = min(open_owners, key=lambda o: (shared_EP[expert, o], -room[o], o))
        owner_E[expert] = owner
        room[owner] -= 1
        shared_EP[:, owner] += together_EE[:, expert]
    for _ in range(MOST_ROUNDS):
        if not _exchange(together_EE, owner_E, shared_EP):
            break
    return [int(owner) for owner in owner_E]


def _exchange(together_EE: Pairs, owner_E: npt.NDArray[np.int_], shared_EP: Pairs) -> bool:
    """Let each expert change places with the best other one; say whether any did."""
    has_changed = False
    own_E = together_EE.diagonal()
    for a in range(len(owner_E)):
        mine = owner_E[a]
        # What the sum gains when a goes to the owner of b and b to that of a.
        stay_E = shared_EP[a, mine] - own_E[a] + shared_EP[range(len(owner_E)), owner_E] - own_E
        go_E = shared_EP[a, owner_E] + shared_EP[:, mine] - 2 * together_EE[a]
        gain_E = np.where(owner_E == mine, -np.inf, stay_E - go_E)
        b = int(gain_E.argmax())
        if gain_E[b] <= 1e-9:
            continue
        theirs = owner_E[b]
        moved_E = together_EE[:, a] - together_EE[:, b]
        shared_EP[:, mine] -= moved_E
        shared_EP[:, theirs] += moved_E
        owner_E[a], owner_E[b] = theirs, mine
        has_changed = True
    return has_changed
