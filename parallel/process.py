"""Start and stop the process group of a torchrun worker."""

import os
import secrets
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import MoeyardError

ADDRESS_KEY = "moeyard/address"
LOOPBACK = "127.0.0.1"


def start_process_group(timeout_s: float) -> dist.Store:
    """Join the group that torchrun's environment describes and return its store.

    gloo serves the CPU; where there are GPUs, NCCL serves them beside it.
    """
    env = os.environ
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    is_one_host = env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]
    if is_one_host and Path("/sys/class/net/lo").exists():
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing leaves the machine
    timeout = timedelta(seconds=timeout_s)
    store = _store_of_this_attempt(rank, world, timeout, is_one_host)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(env["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"  # counts and flags stay on the CPU
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return store


def stop_process_group() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _store_of_this_attempt(
    rank: int, world: int, timeout: timedelta, is_one_host: bool
) -> dist.Store:
    """Return a store that no earlier attempt has written to.

    torchrun's own store outlives its workers: after a restart they find the addresses the dead
    ones left there and fail to connect. So rank 0 opens a fresh store and leaves its address in
    torchrun's; an address that nobody listens at belongs to a dead attempt, and is asked for again.
    The restart count would not do as a prefix: agents on several hosts count differently.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(address, port, world, is_master=rank == 0, timeout=timeout)
    agent = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    if rank == 0:
        host = LOOPBACK if is_one_host else socket.getfqdn()
        own = dist.TCPStore(host, 0, world, is_master=True, timeout=timeout, wait_for_workers=False)
        token = secrets.token_hex(8)
        own.set("token", token)
        agent.set(ADDRESS_KEY, f"{host} {own.port} {token}")
        return own
    return _find_store(agent, world, timeout)


def _find_store(agent: dist.Store, world: int, timeout: timedelta) -> dist.Store:
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        host, port, token = agent.get(ADDRESS_KEY).decode().split()
        if _is_listening(host, int(port)):
            store = dist.TCPStore(
                host, int(port), world, is_master=False, timeout=timeout, wait_for_workers=False
            )
            if store.get("token").decode() == token:
                return store
        time.sleep(0.1)
    raise MoeyardError(
        f"rank 0 did not appear within parallel.timeout_s = {timeout.total_seconds():.0f}; "
        "look at its log or raise the limit."
    )


def _is_listening(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True
