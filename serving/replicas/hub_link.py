"""A replica's connection to the metrics hub: a thread that reports and listens."""

import asyncio
import logging
import threading
import uuid

import ray
from ray.exceptions import RayError

from ...errors import RequestError
from ..hosting import Hosted
from .hub_actor import Stage, open_hub
from .metrics_hub import Snapshot, snapshot_of

log = logging.getLogger(__name__)

PUSH_EVERY_S = 1.0
ANSWER_TIMEOUT_S = 5.0


class HubLink:
    """Pushes this replica's metrics every second and does what the hub's stage asks."""

    def __init__(self, application: str, replica: str, server: Hosted) -> None:
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
            # This replica's metrics alone would look as if counters had gone back.
            log.warning("the metrics hub does not answer: %s", type(error).__name__)
            raise RequestError(
                "the other replicas' metrics are unavailable; try again.",
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
                    self._end_files()
                    self._hub.push.remote(self._incarnation, *self._report())
                    if ray.wait([change], timeout=PUSH_EVERY_S)[0]:
                        stage = ray.get(change)
                        self._enter(stage)
                        break
            except RayError as error:
                log.warning("the metrics hub does not answer: %s", type(error).__name__)
                self._is_closed.wait(PUSH_EVERY_S)

    def _end_files(self) -> None:
        """End the replica's files once it is drained: the server is killed when it hears so."""
        admission = self._server.admission
        if admission.is_draining and admission.num_open == 0:
            self._server.end_files()

    def _enter(self, stage: Stage) -> None:
        if stage != "serving":
            self._server.admission.drain()
        if stage == "ending":
            self._server.thread.stop()
