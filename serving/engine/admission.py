"""Admission of requests: a bounded number, and none while the server drains."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from prometheus_client import Counter

from ...errors import RequestError

Rejection = Literal[
    "queue_full",
    "draining",
    "bad_request",
    "no_key",
    "not_found",
    "timed_out",
    "too_large",
    "failed",
]
"""Why a request is refused: the label of ``moeyard_requests_rejected_total``. The first two are
counted here, the others by api/refusals.py."""

RETRY_WHEN_FULL_S = 1
"""``Retry-After`` of a full server: with dozens of places, one is free by then."""
RETRY_WHEN_DRAINING_S = 10
"""``Retry-After`` of a server that is being replaced."""


class Admission:
    """Places for requests; used from one event loop.

    A request holds its place from the moment it is let in until its response has ended, whether
    it waits or runs. Places are the batch plus the queue, so a burst of any size fills exactly
    that many: nothing depends on how soon the engine notices what has come in.
    """

    def __init__(self, max_running: int, max_queued: int, rejected: Counter) -> None:
        self._max_running = max_running
        self._max_queued = max_queued
        self.rejected = rejected
        """Refused requests by reason."""
        self._num_held = 0
        self._num_open = 0
        self.is_draining = False

    @property
    def num_places(self) -> int:
        """Answers that may run or wait at a time."""
        return self._max_running + self._max_queued

    @property
    def num_open(self) -> int:
        """HTTP requests let in whose responses have not ended."""
        return self._num_open

    @property
    def num_held(self) -> int:
        """Answers that run or wait."""
        return self._num_held

    def drain(self) -> None:
        """Refuse every request from now on."""
        self.is_draining = True

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Hold ``count`` places, or raise :class:`RequestError`: 503 while draining, 429 when the
        queue is full, 400 for more than there could ever be."""
        self._check(count)
        self._num_held += count
        self._num_open += 1
        try:
            yield
        finally:
            self._num_held -= count
            self._num_open -= 1

    def _check(self, count: int) -> None:
        if self.is_draining:
            self.rejected.labels("draining").inc()
            raise RequestError(
                "the server is shutting down; send the request again in a moment.",
                code="unavailable",
                status=503,
                retry_after_s=RETRY_WHEN_DRAINING_S,
            )
        capacity = self.num_places
        if count > capacity:
            raise RequestError(
                f"the request asks for {count} answers, but the server takes {capacity} at a time; "
                "send several requests.",
                param="n",
            )
        if self._num_held + count > capacity:
            self.rejected.labels("queue_full").inc()
            raise RequestError(
                f"the server is busy with {self._num_held} answers and takes {capacity} at a time; "
                f"try again in {RETRY_WHEN_FULL_S} s.",
                code="rate_limit_exceeded",
                status=429,
                retry_after_s=RETRY_WHEN_FULL_S,
            )
