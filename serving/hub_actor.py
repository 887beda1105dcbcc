"""One small Ray actor per application: gathers all replicas' metrics and tells them to drain.

Each replica pushes every second, when it ends, and when it is asked for metrics. What a killed
replica counted after its last push is lost, so up to a second's worth. The actor outlives its
replicas; when it is killed itself, Ray starts it again and the replicas that live push anew, but
the counts of those that had ended are gone, as after any restart of a Prometheus target.
"""

import asyncio
import logging
import threading
import uuid
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from ..errors import RequestError
from .hub import Hub, Snapshot, snapshot_of
from .server import Server

log = logging.getLogger(__name__)

NAMESPACE = "moeyard"
PUSH_EVERY_S = 1.0
ANSWER_TIMEOUT_S = 5.0

Stage = Literal["serving", "draining", "ending"]
"""Serving; letting nobody in but finishing; ending what is left."""


class HubActor:
    """A :class:`Hub` that replicas reach through Ray."""

    def __init__(self) -> None:
        self._hub = Hub()
        self._stage: Stage = "serving"
        self._changed = asyncio.Event()

    async def push(self, *report: Any) -> None:
        """Take a replica's report in, see :meth:`Hub.push`."""
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
        """Tell every replica, those too that start later."""
        self._stage = stage
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def next_stage(self, known: Stage) -> Stage:
        """Wait until the stage is another than ``known`` and return it."""
        while self._stage == known:
            await self._changed.wait()
        return self._stage

    async def is_drained(self) -> bool:
        """See :meth:`Hub.is_drained`."""
        return self._hub.is_drained()


def open_hub(application: str) -> Any:
    """Return the application's hub, started if there is none yet."""
    options = {"lifetime": "detached", "get_if_exists": True, "max_restarts": -1, "num_cpus": 0}
    name = f"hub-{application}"
    return ray.remote(HubActor).options(name=name, namespace=NAMESPACE, **options).remote()


class HubLink:
    """A replica's end of the line: a thread that reports and listens."""

    def __init__(self, application: str, replica: str, server: Server) -> None:
        self._hub = open_hub(application)
        self._replica = replica
        self._server = server
        self._incarnation = uuid.uuid4().hex
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hub-link", daemon=True)
        self._thread.start()

    async def render(self) -> bytes:
        """Return the metrics of all replicas, this one's up to now."""
        answer = self._hub.render.remote(self._incarnation, *self._report())
        try:
            text: bytes = await asyncio.wait_for(answer, ANSWER_TIMEOUT_S)
            return text
        except (RayError, TimeoutError) as error:
            # Only this replica's metrics would look as if counters had gone back.
            log.warning("the metrics hub does not answer: %s", type(error).__name__)
            raise RequestError(
                "the metrics of the other replicas are not to be had now; try again.",
                code="unavailable",
                status=503,
                retry_after_s=1,
            ) from None

    def close(self) -> None:
        """Report for the last time."""
        self._is_closed.set()
        try:
            last = self._hub.end.remote(self._incarnation, *self._report())
            ray.get(last, timeout=ANSWER_TIMEOUT_S)
        except RayError as error:
            log.warning("the last metrics were not delivered: %s", type(error).__name__)

    def _report(self) -> tuple[str, Snapshot, int, bool]:
        admission = self._server.admission
        snapshot = snapshot_of(self._server.metrics.registry)
        return self._replica, snapshot, admission.num_open, admission.is_draining

    def _run(self) -> None:
        stage: Stage = "serving"
        while not self._is_closed.is_set():
            try:
                change = self._hub.next_stage.remote(stage)
                while not self._is_closed.is_set():
                    self._hub.push.remote(self._incarnation, *self._report())
                    if ray.wait([change], timeout=PUSH_EVERY_S)[0]:
                        stage = ray.get(change)
                        self._enter(stage)
                        break
            except RayError as error:
                log.warning("the metrics hub does not answer: %s", type(error).__name__)
                self._is_closed.wait(PUSH_EVERY_S)

    def _enter(self, stage: Stage) -> None:
        if stage != "serving":
            self._server.admission.drain()
        if stage == "ending":
            self._server.thread.stop()
