"""A replica's connection to its node's copies, and to those of other nodes.

Whatever goes wrong here is a miss: the caller reads the disk. Each wait has a bound.
"""

import logging
import threading
import uuid
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from ....errors import ConfigError
from ..policies.policy import Key
from .node_cache import open_node_cache, other_node_caches
from .shared_memory import object_store_bytes

log = logging.getLogger(__name__)

RENEW_EVERY_S = 5.0
LOOK_FOR_NODES_EVERY = 6
"""Renewals between two looks for other nodes."""
OPEN_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 2.0
"""For an actor that only looks something up; a busy machine answers within milliseconds."""
COPY_TIMEOUT_S = 10.0
"""For the bytes, which may come over the network."""


class NodeLink:
    """Asks for copies of experts and brings new ones. Any thread may call it."""

    def __init__(self, model: str, budget_bytes: int) -> None:
        if not ray.is_initialized():
            raise ConfigError("host-memory is in Ray's object store; use it with moeyard serve.")
        self._model = model
        self._budget_bytes = budget_bytes
        self._node = ray.get_runtime_context().get_node_id()
        check_object_store(budget_bytes, self._node)
        self._replica = uuid.uuid4().hex
        self._actor = self._open()
        self._others: list[Any] = []
        self._is_up = self._renew(OPEN_TIMEOUT_S)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="node-cache", daemon=True)
        self._thread.start()

    @property
    def has_other_nodes(self) -> bool:
        """Say whether other nodes hold copies of the model."""
        return bool(self._others)

    def find(self, key: Key) -> np.ndarray | None:
        """Return this node's copy of an expert's bytes, without copying; None without one."""
        if not self._is_up:
            return None
        try:
            found = ray.get(self._actor.find.remote(key), timeout=ANSWER_TIMEOUT_S)
            return _bytes_behind(found)
        except RayError as error:
            self._is_up = False
            log.warning(
                "copies in host memory are not used for now (%s); experts come from the disk.",
                type(error).__name__,
            )
            return None

    def find_elsewhere(self, key: Key) -> np.ndarray | None:
        """Return another node's copy of an expert's bytes, fetched over the network."""
        asked = [actor.find.remote(key) for actor in self._others]
        for answer in asked:
            try:
                stored = _bytes_behind(ray.get(answer, timeout=ANSWER_TIMEOUT_S))
            except RayError as error:
                log.info("another node has no copy of %s: %s", key, type(error).__name__)
                self._others = []  # until the next look
                return None
            if stored is not None:
                return stored
        return None

    def bring(self, key: Key, stored: np.ndarray) -> bool:
        """Give this node a copy of an expert's bytes; say whether it is kept."""
        if not self._is_up:
            return False
        try:
            wanted = self._actor.claim.remote(key, stored.nbytes)
            if not ray.get(wanted, timeout=ANSWER_TIMEOUT_S):
                return False
            kept = self._actor.bring.remote(key, stored)
            return bool(ray.get(kept, timeout=COPY_TIMEOUT_S))
        except RayError as error:
            log.info("host memory has not taken %s: %s", key, type(error).__name__)
            return False

    def drop(self, key: Key) -> None:
        """Let this node forget a copy, which is damaged."""
        self._actor.drop.remote(key)

    def close(self) -> None:
        """End this replica's lease."""
        self._is_closed.set()
        self._thread.join(ANSWER_TIMEOUT_S)
        self._is_up = False
        if ray.is_initialized():
            try:
                ray.get(self._actor.leave.remote(self._replica), timeout=ANSWER_TIMEOUT_S)
            except RayError as error:
                log.info("the lease of the copies runs out by itself: %s", type(error).__name__)

    def _open(self) -> Any:
        return open_node_cache(self._model, self._node, self._budget_bytes)

    def _run(self) -> None:
        turn = 0
        while not self._is_closed.is_set() and ray.is_initialized():
            try:
                if turn % LOOK_FOR_NODES_EVERY == 0:
                    self._others = other_node_caches(self._model, self._node)
                if not self._is_up:
                    self._actor = self._open()  # a new one, if the old one has ended
                self._is_up = self._renew(ANSWER_TIMEOUT_S)
            except RayError as error:
                self._is_up = False
                log.warning("Ray does not answer: %s", type(error).__name__)
            turn += 1
            self._is_closed.wait(RENEW_EVERY_S)

    def _renew(self, timeout_s: float) -> bool:
        try:
            renewal = self._actor.renew.remote(self._replica, self._budget_bytes)
            ray.get(renewal, timeout=timeout_s)
            return True
        except RayError as error:
            log.warning("host memory does not answer: %s", type(error).__name__)
            return False


def check_object_store(budget_bytes: int, node: str | None = None) -> None:
    """Raise :class:`ConfigError` if Ray's object store is too small, on any node or on one."""
    needed = object_store_bytes(budget_bytes)
    for found in ray.nodes():
        has = int(found["Resources"].get("object_store_memory", 0))
        if found["Alive"] and node in (None, found["NodeID"]) and has < needed:
            raise ConfigError(
                f"host-memory is {budget_bytes} bytes, but Ray's object store has {has} and needs "
                f"{needed}; start Ray with --object-store-memory {needed}, or lower host-memory."
            )


def _bytes_behind(found: list["ray.ObjectRef"]) -> np.ndarray | None:
    if not found:
        return None
    stored: np.ndarray = ray.get(found[0], timeout=COPY_TIMEOUT_S)
    return stored
