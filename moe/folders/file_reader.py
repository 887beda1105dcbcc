"""Read bytes of a file into memory we own, through the page cache or around it.

A memory map would be simpler, but if a mapped file is cut short, the process is killed (SIGBUS).
"""

import errno
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PAGE_BYTES = 4096
"""What direct I/O wants offsets to be a multiple of, on every file system that offers it."""
MEMORY_BYTES = 512
"""What it wants addresses and lengths in memory to be a multiple of."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Writable memory."""

    view: memoryview
    address: int

    def part(self, start: int, end: int) -> "Buffer":
        """Return the bytes from ``start`` to ``end``."""
        return Buffer(self.view[start:end], self.address + start)


def buffer_of(tensor: Tensor) -> Buffer:
    """Return the memory of a contiguous CPU tensor."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return Buffer(memoryview(flat.numpy()), flat.data_ptr())  # type: ignore[arg-type]


class FileReader:
    """Reads from an open file; thread-safe. Closing the descriptor is left to the caller."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._direct: int | None = None
        self._spare_pages: list[mmap.mmap] = []
        """Memory that :meth:`_read_by_pages` has used. Not kept by thread: to Python, a thread of
        C++ is a new one at each call."""

    @property
    def descriptor(self) -> int:
        """The open file."""
        return self._descriptor

    @property
    def direct(self) -> int | None:
        """What :meth:`open_direct` opened."""
        return self._direct

    def open_direct(self) -> bool:
        """Prepare reads around the page cache; False where the file system offers none."""
        if self._direct is None and hasattr(os, "O_DIRECT"):
            try:
                # Not by path: that may be another file by now.
                own = f"/proc/self/fd/{self._descriptor}"
                self._direct = os.open(own, os.O_RDONLY | os.O_DIRECT)
            except OSError:
                return False
        return self._direct is not None

    def close(self) -> None:
        """Close what :meth:`open_direct` opened."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def read(self, buffers: Sequence[Buffer], start: int, direct: bool = False) -> None:
        """Fill the buffers with consecutive bytes, from byte ``start`` of the file on.

        ``direct`` goes around the page cache where :meth:`open_direct` has prepared that. Raises
        ``OSError``, also if the file ends too early.
        """
        total = sum(len(buffer.view) for buffer in buffers)
        # A direct read may stop early, at the end of the file for one; the rest is then buffered.
        done = self._read_around_cache(buffers, start, total) if direct else 0
        while done < total:
            count = os.preadv(self._descriptor, _views_from(buffers, done), start + done)
            if count == 0:
                raise OSError(f"{self._path.name} ends {total - done} bytes too early")
            done += count

    def forget(self, start: int, num_bytes: int) -> None:
        """Drop bytes from the page cache, so that they are read from the disk again."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, start, num_bytes, os.POSIX_FADV_DONTNEED)

    def _read_around_cache(self, buffers: Sequence[Buffer], start: int, total: int) -> int:
        """Return how many bytes were read, in one call."""
        if self._direct is None:
            return 0
        lengths_and_addresses = (n for b in buffers for n in (b.address, len(b.view)))
        try:
            if start % PAGE_BYTES == 0 and all(
                n % MEMORY_BYTES == 0 for n in lengths_and_addresses
            ):
                return os.preadv(self._direct, [buffer.view for buffer in buffers], start)
            return self._read_by_pages(self._direct, buffers, start, total)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return 0  # this file system wants larger units
            raise

    def _read_by_pages(
        self, descriptor: int, buffers: Sequence[Buffer], start: int, total: int
    ) -> int:
        """Read the pages around some bytes into aligned memory, and copy the bytes."""
        skip = start % PAGE_BYTES
        num_bytes = -(-(skip + total) // PAGE_BYTES) * PAGE_BYTES
        pages = self._pages(num_bytes)
        try:
            count = os.preadv(descriptor, [memoryview(pages)[:num_bytes]], start - skip)
            if count < skip + total:
                return 0
            source = np.frombuffer(pages, np.uint8)
            for buffer in buffers:
                end = skip + len(buffer.view)
                np.copyto(np.frombuffer(buffer.view, np.uint8), source[skip:end])
                skip = end
        finally:
            self._spare_pages.append(pages)
        return total

    def _pages(self, num_bytes: int) -> mmap.mmap:
        """Return memory of at least this size that no other thread uses."""
        try:
            pages = self._spare_pages.pop()
        except IndexError:
            return mmap.mmap(-1, num_bytes)
        return pages if len(pages) >= num_bytes else mmap.mmap(-1, num_bytes)


def _views_from(buffers: Sequence[Buffer], done: int) -> list[memoryview]:
    """Return what is left when the first ``done`` bytes are filled."""
    views = []
    for buffer in buffers:
        if done < len(buffer.view):
            views.append(buffer.view[done:])
        done = max(0, done - len(buffer.view))
    return views
