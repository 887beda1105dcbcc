"""Refuse in the proxy what the replicas have no place for.

A replica that refuses a request pays for a call through Ray, on the interpreter that its engine
runs on. At twice the load it refuses as much as it answers. So the proxy remembers that a replica
was full, and refuses by itself until an answer has ended, which frees a place, or a moment has
passed. Every end of an answer lets one request through. Replicas still decide: the proxy only
repeats what one has just said.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import RequestError

FULL_FOR_S = 0.25
"""After this long without an end, a request goes through again: another replica may have started,
and places may have become free that this proxy does not know of."""
REFUSED = b"x-moeyard-refused"
"""Tells a replica how many requests the proxy has refused since the last one, for its metrics."""
WITH_PLACES = ("/v1/completions", "/v1/chat/completions")
"""Paths whose requests take places; all others always go through."""
RETRY_AFTER_S = 1


@dataclass(slots=True)
class _Application:
    """What is known of the replicas behind one route prefix."""

    full_until: float = 0.0
    num_freed: int = 0
    """Answers that have ended since a replica was full, less the requests let through."""
    num_refused: int = 0
    """Requests refused that no replica has been told of."""


class Backpressure:
    """Which applications are full, as far as this proxy has heard."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, _Application] = {}

    def check(self, path: str) -> None:
        """Raise :class:`RequestError` (429) for a request that would find no place."""
        application = self._known.get(_prefix(path)) if path.endswith(WITH_PLACES) else None
        if application is None or self._clock() >= application.full_until:
            return
        if application.num_freed > 0:
            application.num_freed -= 1
            return
        application.num_refused += 1
        raise RequestError(
            f"the server is busy with as many answers as it takes; try again in {RETRY_AFTER_S} s.",
            code="rate_limit_exceeded",
            status=429,
            retry_after_s=RETRY_AFTER_S,
        )

    def hear(self, path: str, status: int | None) -> None:
        """Hear how a request has ended that was let through; None: without a response."""
        if status == 429:
            application = self._known.setdefault(_prefix(path), _Application())
            application.full_until = self._clock() + FULL_FOR_S
            application.num_freed = 0
        elif status in (None, 200) and path.endswith(WITH_PLACES):  # it had places
            application = self._known.setdefault(_prefix(path), _Application())
            application.num_freed += 1

    def take_refused(self, path: str) -> int:
        """Return how many requests were refused since the last call."""
        application = self._known.get(_prefix(path))
        if application is None:
            return 0
        count, application.num_refused = application.num_refused, 0
        return count


def _prefix(path: str) -> str:
    """Return the application's route prefix: what stands before the API's own path."""
    for own in (*WITH_PLACES, "/v1/models", "/metrics", "/health"):
        if path.endswith(own):
            return path.removesuffix(own)
    return path
