"""Owners as Ray actors: Ray places them on nodes, watches them and starts them again.

Rows do not go through Ray: the leader connects to the actor's listener. An actor ends with the
replica that started it.
"""

import logging
import os
import threading
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from .channel import LostPeerError
from .connecting import Address, Listener
from .owner import Owner
from .owner_spec import OwnerSpec

log = logging.getLogger(__name__)


class OwnerActor:
    """An :class:`Owner` that Ray runs."""

    def __init__(self, spec_json: str) -> None:
        """Open the store and listen, for a leader on another node by TCP on this node's address."""
        spec = OwnerSpec.from_json(spec_json)
        self._owner = Owner(spec)
        here = ray.util.get_node_ip_address()
        self._listener = Listener(bytes.fromhex(spec.secret), spec.leaders_host, here)
        threading.Thread(target=self._serve, name="owner", daemon=True).start()

    def address(self) -> Address:
        """Return where leaders connect."""
        return self._listener.address

    def _serve(self) -> None:
        try:
            self._owner.serve(self._listener)
        except BaseException:
            log.exception("this owner of experts failed; another one takes its place")
            os._exit(1)  # Ray starts the actor again


class RayOwners:
    """See :class:`.Hiring`."""

    def __init__(self) -> None:
        self._actors: dict[int, Any] = {}

    def start(self, spec: OwnerSpec) -> None:
        """See :class:`.Hiring`."""
        options: dict[str, Any] = {
            "num_cpus": 0,
            "max_restarts": -1,
            "max_task_retries": -1,  # a question for the address waits for the next process
            "scheduling_strategy": "SPREAD",
        }
        self._actors[spec.index] = ray.remote(OwnerActor).options(**options).remote(spec.to_json())

    def address(self, index: int, timeout_s: float) -> Address:
        """See :class:`.Hiring`."""
        try:
            found: Address = ray.get(self._actors[index].address.remote(), timeout=timeout_s)
        except GetTimeoutError:
            raise LostPeerError("it is not ready in time") from None
        except RayError as error:
            reason = str(error).strip().splitlines() or [""]
            raise LostPeerError(f"{type(error).__name__}: {reason[-1]}") from None
        return found

    def replace(self, index: int) -> None:
        """See :class:`.Hiring`."""
        ray.kill(self._actors[index], no_restart=False)

    def stop(self) -> None:
        """See :class:`.Hiring`."""
        if ray.is_initialized():
            for actor in self._actors.values():
                ray.kill(actor)
