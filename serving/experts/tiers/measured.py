"""A disk whose reads are counted and timed."""

import time
from collections.abc import Callable
from functools import partial

from ....moe.folders.expert_layouts import ExpertViews
from ..policies.policy import Key
from ..pools import Pools
from ..reads import Straight
from .rates import Rates
from .tier import Tier


class MeasuredTier:
    """A :class:`Tier` that books each expert of ``disk``."""

    def __init__(self, disk: Tier, rates: Rates, pools: Pools) -> None:
        self._disk = disk
        self._rates = rates
        self._pools = pools

    def straight(self, key: Key, views: ExpertViews) -> Straight | None:
        """Return what the disk does, which books the expert."""
        found = self._disk.straight(key, views)
        if found is None:
            return None
        return found._replace(took=partial(self._book, self._pools.bytes_of(key)))

    def reads(self, key: Key, views: ExpertViews) -> list[Callable[[], None]]:
        """Return the disk's calls; the last one books the expert."""
        calls = self._disk.reads(key, views)
        times_s: list[float] = []
        num_bytes = self._pools.bytes_of(key)
        return [partial(self._run, call, times_s, len(calls), num_bytes) for call in calls]

    def _run(
        self, call: Callable[[], None], times_s: list[float], num_calls: int, num_bytes: int
    ) -> None:
        started = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - started)
        if len(times_s) == num_calls:
            self._book(num_bytes, sum(times_s))

    def _book(self, num_bytes: int, seconds: float) -> None:
        self._rates.observe("disk", seconds, num_bytes)
