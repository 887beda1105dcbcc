"""Ray's router in each proxy: it tells the proxy of replicas, and sends requests where they belong.

Ray makes it from a pickled copy of the class and of every object that this file names. So the
guard's knowledge is reached through its module, of which there is one in a process.

The proxy's guard has chosen a replica when it took the request's places (``proxy/places.py``), and
the ticket says which. What has no ticket, as requests through a handle in Python, goes to the
replica that Ray knows the fewest requests of.
"""

from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import (
    LocalityMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from ..proxy import applications
from ..proxy.places import Places, Room

PLACES, CROWD, ORIGINS = "places", "crowd", "origins"
"""What a replica says of itself, ``MoeyardServer.record_replica_metadata``."""


class PlacesRouter(LocalityMixin, RequestRouter):
    """A router that follows tickets."""

    def initialize_state(self, **_: Any) -> None:
        """Begin without replicas. What they say may change with a deployment, unlike Ray's
        arguments of a router."""
        self._places = Places()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return replicas to ask, the best one first."""
        chosen = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # wait before the next try
            chosen = self._follow(pending_request.metadata.session_id)
        best = [r for r in candidate_replicas if r.replica_id.unique_id == chosen]
        return [best, [r for r in candidate_replicas if r not in best]]

    def _follow(self, ticket: str) -> str | None:
        number, prefix = _read(ticket)
        if number is None:
            return None
        if prefix is not None:
            applications.applications.learn(prefix, self._places)
        return self._places.replica_of(number)

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,
        result: Any,
    ) -> None:
        """Hear which replica has taken a request on."""
        super().on_request_routed(pending_request, replica_id, result)
        number, _ = _read(pending_request.metadata.session_id)
        if number is not None:
            self._places.move(number, replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take over which replicas there are."""
        super().update_replicas(replicas)
        self._tell()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Hear that a replica has died, before Ray's controller has noticed."""
        super().on_replica_actor_died(replica_id)
        self._tell()

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        """Hear from a replica how many requests it has."""
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        self._places.hear(replica_id.unique_id, num_ongoing_requests)

    def _tell(self) -> None:
        rooms = {}
        for replica in self.curr_replicas.values():
            said = replica.replica_metadata
            if PLACES not in said:
                continue  # of an older release: it gets what has no ticket, until it is replaced
            is_near = replica.node_id == self._self_node_id
            rooms[replica.replica_id.unique_id] = Room(said[PLACES], is_near)
            self._places.crowd = said.get(CROWD)
            self._places.origins = said.get(ORIGINS, ())
        self._places.set_replicas(rooms)


def _read(ticket: str) -> tuple[int | None, str | None]:
    """Return the number and the route prefix that the guard has written, each if it has."""
    number, has_prefix, prefix = ticket.partition(" ")
    if not number.isdecimal():
        return None, None
    return int(number), prefix if has_prefix else None


def places_routing() -> RequestRouterConfig:
    """Return Ray's configuration for this router."""
    return RequestRouterConfig(request_router_class=f"{__name__}:PlacesRouter")
