"""Memory that the ranks of one host share, without a name that could be left behind.

Each rank makes a part with ``memfd_create`` and the others open it through ``/proc/PID/fd``. Such
memory has no path, so nothing remains after ``kill -9``. It does not count against the size of
``/dev/shm`` (64 MB in a Docker container by default), only against memory itself. Its pages are
allocated immediately, so a lack of memory is an error here and not a signal later.
"""

import logging
import mmap
import os
import secrets
import sys
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)

TOKEN_BYTES = 8
PREFIX_BYTES = mmap.PAGESIZE
"""Room for the token; the callers' memory begins on the next page."""


def share(num_bytes: int, group: dist.ProcessGroup) -> list[Tensor] | None:
    """Return one zeroed byte tensor per rank of ``group``, in rank order, shared by all of them.

    All ranks of the group call it with the same size. Returns None on all of them if one cannot
    share: another host, another container, not Linux, or not enough memory.
    """
    here = _facts_of_host()
    if any(facts != here for facts in gather(here, group)):
        return None
    token = secrets.randbits(8 * TOKEN_BYTES - 1)
    own = _create(num_bytes, token)
    ends = gather([os.getpid(), -1 if own is None else own, token], group)
    parts = [_map(pid, descriptor, num_bytes, token) for pid, descriptor, token in ends]
    found = [part for part in parts if part is not None]
    have_all = agree(len(found) == len(parts), group)
    if own is not None:
        os.close(own)  # the others have opened it or given up
    if not have_all:
        if dist.get_rank(group) == 0:
            log.warning(
                "the ranks of this host cannot share %.1f MB of memory and use gloo instead",
                num_bytes / 1e6,
            )
        return None
    return found


def gather(numbers: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    """Return the numbers of every rank of ``group``."""
    mine = torch.tensor(numbers, dtype=torch.int64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return [row.tolist() for row in everyone]


def agree(holds: bool, group: dist.ProcessGroup) -> bool:
    """Say whether something holds on every rank of ``group``."""
    return all(row == [1] for row in gather([int(holds)], group))


def _facts_of_host() -> list[int]:
    """Return numbers that differ between hosts and between containers with separate processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        return [zlib.crc32(boot), Path("/proc/self/ns/pid").stat().st_ino]
    except OSError:  # not Linux: equal to no other rank
        return [secrets.randbits(62), 0]


def _create(num_bytes: int, token: int) -> int | None:
    """Return a descriptor of new memory that begins with ``token``; None if memory is short."""
    assert sys.platform == "linux", "no other host has facts in common"
    try:
        descriptor = os.memfd_create("moeyard", os.MFD_CLOEXEC)
    except (OSError, AttributeError):  # a Python built for older systems lacks it
        return None
    try:
        os.posix_fallocate(descriptor, 0, PREFIX_BYTES + num_bytes)
        os.pwrite(descriptor, token.to_bytes(TOKEN_BYTES, "little"), 0)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _map(pid: int, descriptor: int, num_bytes: int, token: int) -> Tensor | None:
    """Map the memory that process ``pid`` holds as ``descriptor``; None unless it has ``token``."""
    path = Path(f"/proc/{pid}/fd/{descriptor}")
    try:
        opened = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if os.pread(opened, TOKEN_BYTES, 0) != token.to_bytes(TOKEN_BYTES, "little"):
            return None
        memory = mmap.mmap(opened, PREFIX_BYTES + num_bytes)
    except (OSError, ValueError):
        return None
    finally:
        os.close(opened)
    return torch.frombuffer(memory, dtype=torch.uint8, offset=PREFIX_BYTES, count=num_bytes)
