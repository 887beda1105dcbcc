"""Start and stop the process group of a torchrun worker."""

import ctypes
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that no worker outlives torchrun."""
    parent = os.getppid()
    if not hasattr(ctypes, "CDLL") or os.name != "posix":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the request took effect
        os.kill(os.getpid(), signal.SIGKILL)


def is_torchrun_worker() -> bool:
    """Say whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def start_process_group(timeout_s: float) -> None:
    """Join the group that torchrun's environment describes; gloo for the CPU, NCCL for GPUs.

    Every restart gets its own prefix in torchrun's store: workers of the next attempt would
    otherwise read the addresses the dead ones left there, and fail to connect.
    """
    env = os.environ
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    if env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"] and os.path.isdir("/sys/class/net/lo"):  # noqa: PTH112
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host: nothing leaves the loopback
    timeout = timedelta(seconds=timeout_s)
    tcp = dist.TCPStore(
        env["MASTER_ADDR"],
        int(env["MASTER_PORT"]),
        world,
        is_master=rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timeout,
    )
    store = dist.PrefixStore(f"attempt-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(env["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"  # counts and flags stay on the CPU
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def stop_process_group() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
