"""Which copies of experts a node's memory holds, within a budget of bytes. Knows no Ray."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:  # it imports torch
    from ..policies.policy import Key

Copy = TypeVar("Copy")

MAX_CLAIMS = 4
"""Copies that may be on their way at once: each is in shared memory twice until it has arrived."""
CLAIM_S = 30.0
"""After this time the one who brings a copy counts as gone."""


@dataclass(frozen=True, slots=True)
class DirectoryCounts:
    """What a directory holds and has seen."""

    copies: int
    num_bytes: int
    budget_bytes: int
    hits: int
    misses: int
    evictions: int


class Directory(Generic[Copy]):
    """Copies by expert. The one that was not asked for the longest leaves first.

    A copy comes in two steps: :meth:`claim` makes room, so that the budget holds while the bytes
    are on their way, and :meth:`add` stores it. One claim for each expert, so that two processes
    that read the same expert at the same time leave one copy.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._copies: OrderedDict[Key, tuple[Copy, int]] = OrderedDict()
        self._claims: dict[Key, tuple[int, float]] = {}
        """Bytes, and when the claim ends."""
        self._num_bytes = 0
        self._hits = self._misses = self._evictions = 0

    def counts(self) -> DirectoryCounts:
        """Return what is here."""
        return DirectoryCounts(
            copies=len(self._copies),
            num_bytes=self._num_bytes,
            budget_bytes=self._budget_bytes,
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
        )

    def set_budget(self, budget_bytes: int) -> None:
        """Change the budget; what is too much leaves now."""
        self._budget_bytes = budget_bytes
        self._make_room(0)

    def find(self, key: "Key") -> Copy | None:
        """Return the copy of an expert, if there is one."""
        found = self._copies.get(key)
        if found is None:
            self._misses += 1
            return None
        self._hits += 1
        self._copies.move_to_end(key)
        return found[0]

    def claim(self, key: "Key", num_bytes: int, now_s: float) -> bool:
        """Make room for a copy and say whether the caller may bring it."""
        expired = [key for key, (_, end_s) in self._claims.items() if end_s <= now_s]
        for late in expired:
            del self._claims[late]
        is_known = key in self._copies or key in self._claims
        if is_known or len(self._claims) >= MAX_CLAIMS:
            return False
        claimed = sum(size for size, _ in self._claims.values())
        if claimed + num_bytes > self._budget_bytes:
            return False
        self._claims[key] = (num_bytes, now_s + CLAIM_S)
        self._make_room(claimed + num_bytes)
        return True

    def add(self, key: "Key", copy: Copy) -> bool:
        """Store the copy that was claimed; False where it comes too late, and is not wanted."""
        claim = self._claims.pop(key, None)
        if claim is None or key in self._copies:
            return False
        self._copies[key] = (copy, claim[0])
        self._num_bytes += claim[0]
        return True

    def give_up(self, key: "Key") -> None:
        """Forget a claim: the copy will not come."""
        self._claims.pop(key, None)

    def drop(self, key: "Key") -> None:
        """Forget a copy, which turned out to be lost or damaged."""
        found = self._copies.pop(key, None)
        if found is not None:
            self._num_bytes -= found[1]

    def _make_room(self, claimed_bytes: int) -> None:
        while self._copies and self._num_bytes + claimed_bytes > self._budget_bytes:
            _, (_, num_bytes) = self._copies.popitem(last=False)
            self._num_bytes -= num_bytes
            self._evictions += 1
