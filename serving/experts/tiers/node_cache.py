"""The actor that holds one node's copies of a model's experts, in Ray's shared memory.

One detached actor for each node and model. It puts the bytes into Ray's object store, so they
belong to the actor and outlive the replica that read them; every replica of the node maps the same
copy. Imports neither torch nor the server, so its process stays small.

Replicas hold leases. When all have left or have stopped renewing, the actor ends, and Ray frees the
copies.
"""

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .directory import Directory
from .leases import LOOK_EVERY_S, Leases

if TYPE_CHECKING:  # it imports torch
    from ..policies.policy import Key

NAMESPACE = "moeyard"


class NodeCache:
    """A :class:`Directory` of references that replicas reach through Ray."""

    def __init__(self, budget_bytes: int) -> None:
        self._directory: Directory[ray.ObjectRef] = Directory(budget_bytes)
        self._leases = Leases(time.monotonic())
        self._putter = ThreadPoolExecutor(1, thread_name_prefix="put-copies")
        self._self = ray.get_runtime_context().current_actor
        threading.Thread(target=self._end_when_unused, name="leases", daemon=True).start()

    async def renew(self, replica: str, budget_bytes: int) -> None:
        """Say that a replica lives. The budget is that of the replica that came last."""
        if self._leases.renew(replica, time.monotonic()):
            self._directory.set_budget(budget_bytes)

    async def leave(self, replica: str) -> None:
        """End a replica's lease."""
        self._leases.end(replica, time.monotonic())

    async def find(self, key: "Key") -> list["ray.ObjectRef"]:
        """Return the reference to an expert's copy in a list, which is empty without one.

        In a list, because Ray would fetch a bare reference before it answers.
        """
        copy = self._directory.find(key)
        return [] if copy is None else [copy]

    async def claim(self, key: "Key", num_bytes: int) -> bool:
        """See :meth:`Directory.claim`."""
        return self._directory.claim(key, num_bytes, time.monotonic())

    async def bring(self, key: "Key", stored: np.ndarray) -> bool:
        """Keep a copy of the bytes, which the caller has claimed."""
        loop = asyncio.get_running_loop()
        try:
            # In a thread: other replicas' questions need not wait until the bytes are copied.
            copy = await loop.run_in_executor(self._putter, ray.put, stored)
        except BaseException:
            self._directory.give_up(key)
            raise
        return self._directory.add(key, copy)

    async def drop(self, key: "Key") -> None:
        """See :meth:`Directory.drop`."""
        self._directory.drop(key)

    async def counts(self) -> dict[str, int]:
        """Return the :class:`DirectoryCounts`."""
        return asdict(self._directory.counts())

    async def pid(self) -> int:
        """Return the number of this process."""
        return os.getpid()

    def _end_when_unused(self) -> None:
        while not self._leases.are_over(time.monotonic()):
            time.sleep(LOOK_EVERY_S)
        ray.kill(self._self)


def name_of(model: str, node: str) -> str:
    """Return the name of the actor that holds the copies of ``model`` on ``node``."""
    return f"experts-{model}-{node}"


def open_node_cache(model: str, node: str, budget_bytes: int) -> Any:
    """Return the actor of a node, started if there is none yet."""
    options: dict[str, Any] = {"lifetime": "detached", "get_if_exists": True, "num_cpus": 0}
    options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
    name = name_of(model, node)
    actor = ray.remote(NodeCache).options(name=name, namespace=NAMESPACE, **options)
    return actor.remote(budget_bytes)


def other_node_caches(model: str, node: str) -> list[Any]:
    """Return the actors that hold copies of ``model`` on nodes other than ``node``."""
    found = []
    for other in ray.nodes():
        if other["Alive"] and other["NodeID"] != node:
            try:
                found.append(ray.get_actor(name_of(model, other["NodeID"]), namespace=NAMESPACE))
            except ValueError:  # none there
                continue
    return found
