"""Refuse in the proxy what the replicas have no place for.

A replica that refuses a request pays for a call through Ray, on the interpreter that its engine
runs on, and its word comes back late. So once a replica was full, the proxy counts places: a
request that goes through takes one, and its end frees it. Others are refused here. A request that a
replica refuses all the same frees none: the count was too high.

The count may be too low: another replica has started, or Ray has sent a request to the one replica
that was full. So now and then a request goes through as a probe. If it finds a place, two more
probes follow. A new replica's places are thus found in a few steps, and a full server refuses few
probes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from ...errors import RequestError

PROBE_AFTER_S = 5.0
"""A full server's refusal of a probe is slow. At this distance fewer than one in a hundred are."""
PROBES_AFTER_SUCCESS = 2
REFUSED = b"x-moeyard-refused"
"""Tells a replica how many requests the proxy has refused since the last one, for its metrics."""
WITH_PLACES = ("/v1/completions", "/v1/chat/completions", "/v1/forecast")
"""Paths whose requests take places; all others always go through."""
RETRY_AFTER_S = 1


@dataclass(slots=True)
class _Application:
    """What is known of the replicas behind one route prefix."""

    is_full: bool = False
    """Whether a replica has ever been full."""
    num_free: int = 0
    """Places that have become free since then, less those taken; a probe may take it below 0."""
    probe_at: float = 0.0
    num_probes: int = 0
    """Probes that may go through at once."""
    num_refused: int = 0
    """Requests refused that no replica has been told of."""


class Backpressure:
    """Which applications are full, as far as this proxy has heard."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, _Application] = {}

    def check(self, path: str) -> bool:
        """Say whether a request goes through as a probe.

        Raises :class:`RequestError` (429) for a request that would find no place.
        """
        application = self._known.get(_prefix(path)) if path.endswith(WITH_PLACES) else None
        if application is None or not application.is_full:
            return False
        is_probe = application.num_free <= 0
        if is_probe and application.num_probes > 0:
            application.num_probes -= 1
        elif is_probe and self._clock() >= application.probe_at:
            application.probe_at = self._clock() + PROBE_AFTER_S
        elif is_probe:
            self._refuse(application)
        application.num_free -= 1
        return is_probe

    def _refuse(self, application: _Application) -> NoReturn:
        application.num_refused += 1
        raise RequestError(
            f"the server is busy with as many answers as it takes; try again in {RETRY_AFTER_S} s.",
            code="rate_limit_exceeded",
            status=429,
            retry_after_s=RETRY_AFTER_S,
        )

    def hear_start(self, path: str) -> None:
        """Hear that a probe has found a place, which was not in the count."""
        application = self._known[_prefix(path)]
        application.num_free += 1
        application.num_probes += PROBES_AFTER_SUCCESS

    def hear_end(self, path: str, status: int | None, is_probe: bool = False) -> None:
        """Hear how a request has ended that was let through; None: without a response."""
        if not path.endswith(WITH_PLACES):
            return
        application = self._known.setdefault(_prefix(path), _Application())
        if status != 429 or is_probe:
            application.num_free += 1
        if status == 429:
            application.num_probes = 0
            application.probe_at = self._clock() + PROBE_AFTER_S
            if not application.is_full:
                application.is_full, application.num_free = True, 0

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
