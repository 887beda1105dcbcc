"""Send requests that begin alike to one replica, which may still have what it computed for them.

Ray makes one router in each of its proxies. It knows where the beginnings that it has seen went
last (``proxy/beginnings.py`` names them). The replica that has the longest of a request's
beginnings gets the request, unless more requests are there than elsewhere by a limit. All other
requests go to the emptier of two replicas, as with Ray's own router.
"""

import random
from collections import OrderedDict
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import (
    LocalityMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from ..proxy.beginnings import Wish

MOST_KNOWN = 100_000
"""Beginnings remembered, of about 200 bytes each; the one not seen for longest is forgotten."""


class LastSeen:
    """Which replica saw each beginning last."""

    def __init__(self, most: int = MOST_KNOWN) -> None:
        self._most = most
        self._where: OrderedDict[str, ReplicaID] = OrderedDict()

    def find(self, names: list[str], among: set[ReplicaID]) -> ReplicaID | None:
        """Return the replica of the longest beginning that one of ``among`` has seen."""
        for name in reversed(names):
            replica = self._where.get(name)
            if replica in among:
                return replica
        return None

    def add(self, names: list[str], replica: ReplicaID) -> None:
        """Remember that ``replica`` has seen these beginnings."""
        for name in names:
            self._where[name] = replica
            self._where.move_to_end(name)
        while len(self._where) > self._most:
            self._where.popitem(last=False)


class PrefixRouter(LocalityMixin, RequestRouter):
    """A router by beginnings, with a limit on how uneven queues may become."""

    def initialize_state(self, limit: int) -> None:  # type: ignore[override]
        """Take the router's arguments from Ray's configuration.

        A replica is passed over when it has more than ``limit`` requests more than another one.
        """
        self._limit = limit
        self._seen = LastSeen()
        Wish.is_there = True

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return replicas to ask, the best one first."""
        known = self.curr_replicas
        ids = list(self.apply_locality_routing(pending_request))
        others = [known[i] for i in random.sample(ids, min(2, len(ids))) if i in known]
        last = self._seen.find(_names(pending_request), set(known))
        if last is None or self._is_crowded(last):
            return [others]
        return [[known[last]], others]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Remember where the request went."""
        self._seen.add(_names(pending_request), replica_id)

    def _is_crowded(self, replica: ReplicaID) -> bool:
        """True where the replica has too many requests more than the emptiest one."""
        # None: not asked for a while, so it had none.
        counts = {i: self.replica_queue_len_cache.get(i) or 0 for i in self.curr_replicas}
        return counts[replica] - min(counts.values()) > self._limit


def _names(request: PendingRequest | None) -> list[str]:
    names = request.metadata.session_id if request is not None else ""
    return names.split(",") if names else []


def prefix_routing(batch: int) -> RequestRouterConfig:
    """Return Ray's configuration for replicas that compute ``batch`` answers together.

    A replica that has half a batch more than another one is passed over: its answers would be
    slower by more than most beginnings save.
    """
    return RequestRouterConfig(
        request_router_class=f"{__name__}:PrefixRouter",
        request_router_kwargs={"limit": max(1, batch // 2)},
    )
