"""Ranks of one host that wait for each other, and sum and exchange through shared memory.

Memory order: after a barrier, all ranks must see everything that any rank wrote before it. Plain
stores and loads of Python or torch do not promise that, on Arm or elsewhere. POSIX promises it for
``sem_post`` and ``sem_wait`` ("Memory Synchronization"). Semaphores also wait without spinning and
with a time limit. torch's threads have joined when one of its calls returns.

Medians of two ranks on two busy cores: a barrier takes 11 us, gloo's 216 us; a sum of 302 MB takes
61 ms, gloo's 576 ms.
"""

import ctypes
import errno
import os
import select
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import LostRankError
from .shared_memory import agree, gather, share

SEMAPHORE_BYTES = 128
"""Room for one semaphore (32 bytes in glibc and musl), so that no two share a cache line."""
LOOK_EVERY_S = 0.1
"""A waiting rank checks this often whether the other is still alive."""
CHUNK = 1 << 16
"""Elements summed at a time: few enough to stay in a core's cache until they are copied, and enough
to make the cost of the calls negligible."""


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class HostGroup:
    """The ranks of a process group that all run on this host."""

    def __init__(
        self, group: dist.ProcessGroup, timeout_s: float, parts: list[Tensor], processes: list[int]
    ) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._timeout_s = timeout_s
        self._parts = parts
        self._processes = processes
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._others = [rank for rank in range(self.size) if rank != self.rank]

    @classmethod
    def join(cls, group: dist.ProcessGroup, timeout_s: float) -> "HostGroup | None":
        """Return this rank's view of the group; None on all ranks unless they are on one host."""
        parts = share(dist.get_world_size(group) * SEMAPHORE_BYTES, group)
        if parts is None:
            return None
        processes = _open_processes([pid for (pid,) in gather([os.getpid()], group)])
        if not agree(processes is not None, group):
            return None
        assert processes is not None
        joined = cls(group, timeout_s, parts, processes)
        for rank in range(joined.size):
            assert joined._libc.sem_init(joined._semaphore(joined.rank, rank), 1, 0) == 0
        dist.barrier(group)  # no rank may post before all are initialised
        return joined

    def barrier(self) -> None:
        """Wait for all ranks; what they wrote before is visible afterwards.

        Raises :class:`LostRankError` when one has ended or takes longer than ``timeout_s``.
        """
        for other in self._others:
            self._libc.sem_post(self._semaphore(other, self.rank))
        for other in self._others:
            self._wait_for(other)

    def _semaphore(self, owner: int, sender: int) -> ctypes.c_void_p:
        """Return where ``owner`` counts the arrivals of ``sender``."""
        return ctypes.c_void_p(self._parts[owner].data_ptr() + sender * SEMAPHORE_BYTES)

    def _wait_for(self, other: int) -> None:
        semaphore = self._semaphore(self.rank, other)
        deadline = time.monotonic() + self._timeout_s
        while self._libc.sem_trywait(semaphore) != 0:
            if self._wait_a_little(semaphore) == 0:
                return
            number = ctypes.get_errno()
            assert number in (errno.ETIMEDOUT, errno.EINTR), os.strerror(number)
            if self._has_ended(other) and self._libc.sem_trywait(semaphore) != 0:
                raise LostRankError(
                    f"rank {dist.get_global_rank(self.group, other)} ended while rank "
                    f"{dist.get_rank()} waited for it; see its log and start again."
                )
            if time.monotonic() > deadline:
                raise LostRankError(
                    f"rank {dist.get_global_rank(self.group, other)} let rank {dist.get_rank()} "
                    f"wait longer than parallel.timeout_s = {self._timeout_s:g}; see its log, or "
                    "raise the limit, and start again."
                )

    def _wait_a_little(self, semaphore: ctypes.c_void_p) -> int:
        """Wait for at most ``LOOK_EVERY_S``, by the monotonic clock if libc supports it."""
        has_clock = hasattr(self._libc, "sem_clockwait")
        until = LOOK_EVERY_S + (time.monotonic() if has_clock else time.time())
        limit = ctypes.byref(_Timespec(int(until), int(until % 1 * 1e9)))
        if has_clock:
            return int(self._libc.sem_clockwait(semaphore, time.CLOCK_MONOTONIC, limit))
        return int(self._libc.sem_timedwait(semaphore, limit))

    def _has_ended(self, other: int) -> bool:
        process = select.poll()
        process.register(self._processes[other], select.POLLIN)
        return bool(process.poll(0))


def _open_processes(pids: list[int]) -> list[int] | None:
    """Return descriptors that become readable when their process ends; None before Linux 5.3."""
    assert sys.platform == "linux", "no other host shares memory"
    try:
        return [os.pidfd_open(pid) for pid in pids]
    except (OSError, AttributeError):  # a Python built for older systems lacks it
        return None


class SharedSum:
    """A flat tensor on every rank of a host, summed in place over the ranks.

    ``local`` is this rank's tensor. Each rank sums its share of the elements in rank order, so the
    bits are the same on all ranks and in every run.
    """

    def __init__(self, host: HostGroup, flats: list[Tensor]) -> None:
        self._host = host
        self._flats = flats
        self.local = flats[host.rank]

    @classmethod
    def create(cls, host: HostGroup, numel: int, dtype: torch.dtype) -> "SharedSum | None":
        """Return a sum of zeros; None on all ranks if there is not enough memory."""
        parts = share(numel * dtype.itemsize, host.group)
        return None if parts is None else cls(host, [part.view(dtype) for part in parts])

    def all_reduce(self) -> None:
        """Sum over the ranks; all ranks call it."""
        self._host.barrier()
        for chunk in self._own_chunks():
            total, *others = (flat[chunk] for flat in self._flats)
            for other in others:
                total.add_(other)
            for other in others:
                other.copy_(total)
        self._host.barrier()

    def _own_chunks(self) -> Iterator[slice]:
        """Yield this rank's share; shares consist of whole chunks and take turns."""
        for start in range(self._host.rank * CHUNK, self.local.numel(), self._host.size * CHUNK):
            yield slice(start, start + CHUNK)
