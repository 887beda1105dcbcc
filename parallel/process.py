"""Start and stop the process group of a torchrun worker, with a watch over its ranks."""

import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import LostRankError, Stopped
from .gpus import take_gpu
from .parent import is_torchrun_worker
from .watch.last_word import say_last
from .watch.lost_rank import last_line
from .watch.watch import GRACE_S, Stop, Watch

ADDRESS_KEY = "moeyard/address"
LOOPBACK = "127.0.0.1"
ASK_EVERY = timedelta(seconds=1)


@contextmanager
def process_group(timeout_s: float, stop: Stop | None = None) -> Iterator[Watch | None]:
    """Join the group that torchrun's environment describes; yield the watch, None without torchrun.

    gloo serves the CPU; with GPUs, NCCL serves those. An error that another rank caused is raised
    as a :class:`LostRankError` that names that rank. An error of this rank is reported to the
    others.
    """
    if not is_torchrun_worker():
        yield None
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, watch = _join(rank, world, timeout_s, stop)
    ends_together = not torch.cuda.is_available()
    try:
        watch.wait_for_all(stop)
        take_gpu(watch)
        _init(rank, world, store, timeout_s)
        yield watch
        if torch.cuda.is_available():
            dist.destroy_process_group()  # while rank 0 is there: NCCL's threads ask its store
        watch.leave()
    except BaseException as error:
        ends_together |= isinstance(error, Stopped)
        lost = watch.explain(error)
        watch.fail(lost or error)
        if lost is None:
            raise
        raise lost from error
    finally:
        # NCCL's groups end together. After an error the others are in a collective and would let
        # this rank wait, with its error unsaid; the process ends without that (__main__.py).
        if dist.is_initialized() and ends_together:
            dist.destroy_process_group()
        watch.close()


def _init(rank: int, world: int, store: dist.Store, timeout_s: float) -> None:
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"  # counts and flags stay on the CPU
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def _join(rank: int, world: int, timeout_s: float, stop: Stop | None) -> tuple[dist.Store, Watch]:
    """Find the other ranks; return a store that no earlier attempt has written to, and the watch.

    torchrun's own store outlives its workers. After a restart, they would find the addresses of
    dead workers there and fail to connect. So rank 0 opens a fresh store and leaves its address in
    torchrun's. If nothing listens at an address, it belongs to a dead attempt, and the rank asks
    again. The restart count cannot serve as a prefix: agents on several hosts count differently.
    """
    is_one_host = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
    if is_one_host and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nothing leaves the machine
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = timedelta(seconds=timeout_s)
    silent = (
        f"the store at {address}:{port} has not answered rank {rank} for parallel.timeout_s = "
        f"{timeout_s:g}: torchrun, rank 0 or their host is stopped; look there and start again."
    )
    try:
        with _time_limit(timeout_s, silent):
            known = dist.TCPStore(
                address,
                port,
                is_master=rank == 0 and not is_agents,
                timeout=timeout,
                wait_for_workers=False,
            )
            if rank == 0:
                # MASTER_ADDR is rank 0's host as torchrun was told to reach it. The host's own name
                # may not resolve on other hosts.
                host = LOOPBACK if is_one_host else address
                return _open(known, host, is_agents, world, timeout_s)
            return _find(known, rank, world, timeout_s, is_agents, stop)
    except dist.DistError as error:
        raise LostRankError(
            f"the store at {address}:{port} cannot be reached by rank {rank} ({last_line(error)}); "
            "check that torchrun and rank 0 run there, and start again."
        ) from error


def _open(
    known: dist.Store, host: str, is_agents: bool, world: int, timeout_s: float
) -> tuple[dist.Store, Watch]:
    """Open this attempt's store and watch, on rank 0, and leave their address."""
    store, store_port = known, 0
    token = secrets.token_hex(8)
    if is_agents:
        timeout = timedelta(seconds=timeout_s)
        own = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        store, store_port = own, own.port
    watch = Watch(0, world, token, timeout_s)
    port = watch.listen(LOOPBACK if host == LOOPBACK else "")
    known.set(ADDRESS_KEY, f"{host} {store_port} {port} {token}")
    return store, watch


def _find(
    known: dist.Store,
    rank: int,
    world: int,
    timeout_s: float,
    is_agents: bool,
    stop: Stop | None,
) -> tuple[dist.Store, Watch]:
    """Join what rank 0 opened for this attempt."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if stop is not None and stop.signal_name is not None:
            raise Stopped(f"stopped by {stop.signal_name} while ranks start.")
        try:
            known.wait([ADDRESS_KEY], ASK_EVERY)
        except dist.DistStoreError:
            continue
        host, store_port, port, token = known.get(ADDRESS_KEY).decode().split()
        watch = Watch(rank, world, token, timeout_s)
        try:
            watch.connect(host, int(port))
        except OSError:  # the address of an attempt that has ended
            time.sleep(0.1)
            continue
        store = known
        if is_agents:
            timeout = timedelta(seconds=timeout_s)
            store = dist.TCPStore(
                host, int(store_port), is_master=False, timeout=timeout, wait_for_workers=False
            )
        return store, watch
    raise LostRankError(
        f"rank 0 did not appear within parallel.timeout_s = {timeout_s:g} of rank {rank}; "
        "see its log or raise the limit."
    )


@contextmanager
def _time_limit(timeout_s: float, sentence: str) -> Iterator[None]:
    """End the process with ``sentence`` if torch's store waits beyond the limit."""

    def end() -> None:
        say_last(sentence)
        os._exit(1)

    timer = threading.Timer(timeout_s + GRACE_S, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
