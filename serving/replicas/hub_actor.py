"""One small Ray actor per application: gathers all replicas' metrics and tells them to drain.

Imports neither torch nor the server, so its process stays small.

Each replica pushes every second, when it ends, and when it is asked for metrics. A killed replica
loses what it counted after its last push: at most a second's worth. The actor outlives its
replicas. If it is killed, Ray starts it again and the living replicas push again. The counts of
ended replicas are then lost, as after any restart of a Prometheus target.
"""

import asyncio
from typing import Any, Literal

import ray

from .metrics_hub import MetricsHub

NAMESPACE = "moeyard"

Stage = Literal["serving", "draining", "ending"]
"""``draining`` refuses new requests and finishes the others; ``ending`` ends the others too."""


class HubActor:
    """A :class:`MetricsHub` that replicas reach through Ray."""

    def __init__(self) -> None:
        self._hub = MetricsHub()
        self._stage: Stage = "serving"
        self._changed = asyncio.Event()

    async def push(self, *report: Any) -> None:
        """Take a replica's report in, see :meth:`MetricsHub.push`."""
        self._hub.push(*report)

    async def end(self, incarnation: str, *report: Any) -> None:
        """Take a replica's last report in."""
        self._hub.push(incarnation, *report)
        self._hub.end(incarnation)

    async def render(self, *report: Any) -> bytes:
        """Take a report in and return the metrics of all replicas."""
        self._hub.push(*report)
        return self._hub.render()

    async def set_stage(self, stage: Stage) -> None:
        """Set the stage for every replica, including those that start later."""
        self._stage = stage
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def next_stage(self, known: Stage) -> Stage:
        """Wait until the stage is another than ``known`` and return it."""
        while self._stage == known:
            await self._changed.wait()
        return self._stage

    async def is_drained(self) -> bool:
        """See :meth:`MetricsHub.is_drained`."""
        return self._hub.is_drained()


def open_hub(application: str) -> Any:
    """Return the application's hub, started if there is none yet."""
    options = {"lifetime": "detached", "get_if_exists": True, "max_restarts": -1, "num_cpus": 0}
    name = f"hub-{application}"
    return ray.remote(HubActor).options(name=name, namespace=NAMESPACE, **options).remote()
