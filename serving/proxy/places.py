"""Take the places of replicas in the proxy, so that what would find none is refused at once.

A replica that refuses a request pays for a call through Ray, on the interpreter that its engine
runs on, and its word comes back late. But each replica says how many places it has when it starts,
and Ray tells its router in every proxy (``replicas/places_router.py``). So the proxy takes a
request's places before it sends it, at the replica that has the fewest taken, and its end gives
them back. A request that fits nowhere is refused here, as soon as
the router has told which application is under its prefix (``applications.py``).

Other proxies send requests to the same replicas. With each request that it takes on, a replica says
how many it works on. Those that are not of this proxy hold places as well, for as long as that is
news. A replica hears of an end after this proxy does, so what has just ended is taken off.
"""

import itertools
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import RequestError
from .beginnings import LastSeen

HEADER = b"x-session-id"
"""Carries a ticket to the router: Ray gives it the value of this header, and nothing else of a
request. The guard takes it away from clients."""
REFUSED = b"x-moeyard-refused"
"""Tells a replica how many requests the proxy has refused since the last one, for its metrics."""
RETRY_AFTER_S = 1
OTHERS_FOR_S = 1.0
"""How long requests of other proxies count: without news, they may have ended."""
ENDED_FOR_S = 0.2
"""How long a replica may still count a request that has ended here, as when its client left."""
NOWHERE = ""
"""Where a request waits while there are no replicas."""


@dataclass(frozen=True, slots=True)
class Room:
    """What the router knows of a replica."""

    places: int
    is_near: bool
    """Whether it runs on this machine."""


@dataclass(slots=True)
class Ticket:
    """A request on its way, and the places that it takes."""

    number: int
    count: int
    replica: str = NOWHERE


class Places:
    """The replicas of one application and what requests of this proxy hold there.

    The guard takes and gives back in the proxy's thread, Ray's router asks in another one.
    """

    _numbers = itertools.count(1)  # of all applications: a ticket is never taken for another one

    def __init__(
        self, crowd: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``crowd``: send requests that begin alike to one replica, unless it has more than so many
        places more taken than another one. None: never."""
        self.crowd, self._clock = crowd, clock
        self.origins: Sequence[str] = ()
        """Web pages that may call the application from a browser."""
        self._lock = threading.Lock()
        self._seen = LastSeen()
        self._rooms: dict[str, Room] = {}
        self._most = 0
        """Places of the largest replica; the last one known if there are none."""
        self._tickets: dict[int, Ticket] = {}
        self._taken: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()
        self._others: dict[str, tuple[int, float]] = {}
        self._ended: deque[tuple[str, float]] = deque()
        """Where requests have just ended, and until when they may count there."""
        self._num_refused = 0

    @property
    def wants_beginnings(self) -> bool:
        """Whether :meth:`take` makes use of a request's beginnings."""
        return self.crowd is not None

    def set_replicas(self, rooms: dict[str, Room]) -> None:
        """Know the replicas that there are now."""
        with self._lock:
            self._rooms = dict(rooms)
            self._most = max((room.places for room in rooms.values()), default=self._most)
            self._others = {name: own for name, own in self._others.items() if name in rooms}
            for ticket in self._tickets.values():  # before any newcomer, the oldest first
                if ticket.replica == NOWHERE:
                    self._seat_again(ticket)

    def hear(self, replica: str, num_requests: int) -> None:
        """Hear how many requests a replica works on, those of other proxies included."""
        with self._lock:
            now = self._clock()
            self._forget_ended(now)
            ended = sum(name == replica for name, _ in self._ended)
            others = num_requests - self._requests[replica] - ended
            self._others[replica] = (max(0, others), now + OTHERS_FOR_S)

    def take(self, count: int, beginnings: Sequence[str] = ()) -> Ticket:
        """Take ``count`` places, which may be 0, at one replica.

        Raises :class:`RequestError` (429) where no replica has so many. More than a replica ever
        has are none: it will say so itself.
        """
        with self._lock:
            count = count if count <= self._most else 0
            replica = self._choose(count, beginnings)
            if replica is None and not self._rooms and self._taken[NOWHERE] + count <= self._most:
                replica = NOWHERE
            if replica is None:
                self._num_refused += 1
                raise _full(count)
            self._seen.add(beginnings, replica)
            ticket = Ticket(next(self._numbers), count)
            self._tickets[ticket.number] = ticket
            self._seat(ticket, replica)
            return ticket

    def give_back(self, ticket: Ticket) -> None:
        """Free the places of a request that has ended, once however often it is called."""
        with self._lock:
            if self._tickets.pop(ticket.number, None) is None:
                return
            self._unseat(ticket)
            now = self._clock()
            self._forget_ended(now)
            self._ended.append((ticket.replica, now + ENDED_FOR_S))

    def replica_of(self, number: int) -> str | None:
        """Return the replica that a ticket is for, or None if it is for none.

        If that one has gone, or there was none yet, the ticket moves.
        """
        with self._lock:
            ticket = self._tickets.get(number)
            if ticket is None:
                return None
            if ticket.replica not in self._rooms and not self._seat_again(ticket):
                return None
            return ticket.replica

    def move(self, number: int, replica: str) -> None:
        """Hear that a replica has taken a request on, perhaps not the one that its ticket is for.

        Ray asks others where that one does not answer. What had no ticket there was just heard of
        as another proxy's, see :meth:`hear`.
        """
        with self._lock:
            ticket = self._tickets.get(number)
            if ticket is not None:
                if ticket.replica == replica:
                    return
                self._unseat(ticket)
                self._seat(ticket, replica)
            if replica in self._others:
                others, until = self._others[replica]
                self._others[replica] = (max(0, others - 1), until)

    def take_refused(self) -> int:
        """Return how many requests were refused since the last call."""
        with self._lock:
            count, self._num_refused = self._num_refused, 0
            return count

    def tell_later(self, count: int) -> None:
        """Take back refusals that could not be told."""
        with self._lock:
            self._num_refused += count

    def _choose(self, count: int, beginnings: Sequence[str]) -> str | None:
        """Return the replica with the fewest places taken, the nearer one of equals."""
        now = self._clock()
        loads = {name: self._taken[name] + self._num_others(name, now) for name in self._rooms}
        fitting = [n for n in loads if count == 0 or loads[n] + count <= self._rooms[n].places]
        if not fitting:
            return None
        if (crowd := self.crowd) is not None:
            last = self._seen.find(beginnings, fitting)
            if last is not None and loads[last] - min(loads.values()) <= crowd:
                return last
        return min(fitting, key=lambda n: (loads[n], not self._rooms[n].is_near, random.random()))

    def _forget_ended(self, now: float) -> None:
        while self._ended and self._ended[0][1] <= now:
            self._ended.popleft()

    def _num_others(self, replica: str, now: float) -> int:
        count, until = self._others.get(replica, (0, 0.0))
        return count if now < until else 0

    def _seat_again(self, ticket: Ticket) -> bool:
        """Move a ticket to a replica that has room for it, if there is one."""
        replica = self._choose(ticket.count, ())
        if replica is None:
            return False
        self._unseat(ticket)
        self._seat(ticket, replica)
        return True

    def _seat(self, ticket: Ticket, replica: str) -> None:
        ticket.replica = replica
        self._taken[replica] += ticket.count
        self._requests[replica] += 1

    def _unseat(self, ticket: Ticket) -> None:
        self._taken[ticket.replica] -= ticket.count
        self._requests[ticket.replica] -= 1
        if self._requests[ticket.replica] == 0:
            del self._requests[ticket.replica], self._taken[ticket.replica]


def _full(count: int) -> RequestError:
    problem, remedy = "is busy with as many answers as it takes", ""
    if count > 1:
        problem = f"has no room for {count} answers of one request at the moment"
        remedy = "ask for fewer (n times prompts) or "
    return RequestError(
        f"the server {problem}; {remedy}try again in {RETRY_AFTER_S} s.",
        code="rate_limit_exceeded",
        status=429,
        retry_after_s=RETRY_AFTER_S,
    )
