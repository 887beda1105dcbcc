"""Owners of experts as threads of the test, over the same transport as processes."""

import contextlib
import socket
import threading
import time

from moeyard.serving.expert_parallel.connecting import Address, Listener
from moeyard.serving.expert_parallel.owner import Owner
from moeyard.serving.expert_parallel.sharding import ShardedModel
from moeyard.serving.experts.options import StoreOptions
from moeyard.serving.loading import open_model

ELSEWHERE = "another host"
"""A leader's host that no owner is on, so that it listens on TCP."""


class ThreadOwners:
    """Starts an owner at once; :meth:`kill` cuts its connection and lets it start again."""

    def __init__(self):
        self.specs, self.owners, self.listeners, self.channels = {}, {}, {}, {}
        self.starts = 0

    def start(self, spec):
        self.starts += 1
        owner = Owner(spec)
        listener = Listener(bytes.fromhex(spec.secret), spec.leaders_host)
        accept = listener.accept

        def accept_and_remember(facts):
            self.channels[spec.index] = channel = accept(facts)
            return channel

        listener.accept = accept_and_remember
        self.specs[spec.index], self.owners[spec.index] = spec, owner
        self.listeners[spec.index] = listener
        threading.Thread(target=_serve, args=(owner, listener), daemon=True).start()

    def address(self, index: int, timeout_s: float) -> Address:
        if index not in self.listeners:
            self.start(self.specs[index])
        return self.listeners[index].address

    def replace(self, index):
        self.listeners.pop(index).close()

    def kill(self, index):
        """End an owner as its process would: no one listens, and the connection is cut."""
        while index not in self.channels:
            time.sleep(0.001)  # the leader is quicker than the owner's thread
        self.replace(index)
        self.channels.pop(index)._socket.shutdown(socket.SHUT_RDWR)

    def stop(self):
        for listener in self.listeners.values():
            listener.close()
        for owner in self.owners.values():
            owner.close()


def _serve(owner, listener):
    with contextlib.suppress(OSError):  # the listener is closed
        owner.serve(listener)


def open_sharded(folder, num_owners, dtype=None, expert_memory=None, **options):
    """Return a model whose experts have several owners, its store and its owners."""
    hiring = options.pop("hiring", None) or ThreadOwners()
    sharding = ShardedModel(num_owners, hiring, **options)
    model, store = open_model(
        folder, dtype, expert_memory=expert_memory, options=StoreOptions(sharding=sharding)
    )
    return model, store, sharding
