"""One idle worker process, for the next replica that must be replaced.

Ray starts a worker when something needs one. So a thread looks whether there is an idle one, and
asks the raylet for it otherwise; ``warm_up.py`` has it import what a replica needs. A spare that
cannot be had costs nothing but the seconds that it would have saved.
"""

import logging
import os
import threading
import time
from pathlib import Path

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.common_pb2 import Language
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

from .guardian import IDLE_WORKER, SPARE_ORDER, children

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
ASK_AGAIN_AFTER_S = 20.0
"""A busy machine takes this long to start a process."""
KEEP_FOR_S = 10 * 365 * 24 * 3600
"""Ray ends idle workers after a second, unless they were asked for with a longer time."""
TIMEOUT_S = 10.0


class SpareWorker:
    """A thread that sees to it that an idle worker is there; for a Ray of this process."""

    def __init__(self) -> None:
        (node,) = ray.nodes()
        address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        self._raylet = NodeManagerServiceStub(init_grpc_channel(address))
        self._order = Path(os.environ[SPARE_ORDER])
        threading.Thread(target=self._run, name="spare-worker", daemon=True).start()

    def _run(self) -> None:
        wait_s = 0.0
        while True:
            time.sleep(LOOK_EVERY_S)
            wait_s -= LOOK_EVERY_S
            if wait_s > 0 or _num_idle() > 0:
                continue
            wait_s = ASK_AGAIN_AFTER_S
            request = PrestartWorkersRequest(
                language=Language.PYTHON, num_workers=1, keep_alive_duration_secs=KEEP_FOR_S
            )
            try:
                self._order.touch()
                self._raylet.PrestartWorkers(request, timeout=TIMEOUT_S)
            except (OSError, grpc.RpcError) as error:
                log.warning("no worker is kept ready for a replica (%s)", type(error).__name__)
                return


def _num_idle() -> int:
    """Return how many workers of our raylet have nothing to do."""
    raylets = [pid for pid, name, _ in children(os.getpid()) if name == "raylet"]
    return sum(name == IDLE_WORKER for raylet in raylets for _, name, _ in children(raylet))
