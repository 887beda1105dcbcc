"""One expert on its way from disk into memory: read in chunks, checked, put where it belongs."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import xxhash
from torch import Tensor

from .expert_hashes import DamagedExpertError, ExpertHashes, Key
from .extents import DiskOrder, Piece
from .file_reader import Buffer, buffer_of

GetBuffer = Callable[[Tensor], Buffer]
"""Finds the memory of a tensor."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StraightRead:
    """An expert whose bytes go into their places as they are, for who reads files otherwise."""

    order: DiskOrder
    tensors: tuple[Tensor, ...]
    """Where each place of ``order`` goes."""
    is_direct: bool
    digest: int
    """What the hash of all bytes must be, in the order of the disk."""


class ExpertRead:
    """Fills the pieces of an expert.

    Memory for what cannot be read straight into its place is taken when the first step runs, and
    given back after the last.
    """

    def __init__(
        self,
        key: Key,
        pieces: Sequence[Piece],
        order: DiskOrder,
        hashes: ExpertHashes | None,
        direct: bool,
        buffer_of_slot: GetBuffer = buffer_of,
    ) -> None:
        self._key = key
        self._pieces = pieces
        self._hashes = hashes
        self._direct = direct
        self._order = order
        self._buffer_of_slot = buffer_of_slot
        self._stored: list[list[Tensor]] = []
        self._buffers: list[Buffer] = []

    def steps(self) -> list[Callable[[], None]]:
        """Return calls to be made one after the other; one that failed may be made again.

        They raise ``OSError`` if bytes cannot be read, and :class:`DamagedExpertError` if they are
        not those they should be.
        """
        last = len(self._order.chunks) - 1
        return [*(partial(self._read, number) for number in range(last)), self._finish]

    def straight(self) -> StraightRead | None:
        """Return what it takes to read the expert elsewhere.

        None if something must be converted or done after reading, or if the hash is not known.
        """
        digest = None if self._hashes is None else self._hashes.get(self._key)
        tensors = []
        for piece in self._pieces:
            if not isinstance(piece.put, Tensor) or piece.after is not None:
                return None
            if not piece.places[0].entry.is_stored_as(piece.put):
                return None
            tensors.append(piece.put)
        if digest is None:
            return None
        return StraightRead(self._order, tuple(tensors), self._direct, digest)

    def check(self) -> None:
        """Read and check, and put nothing anywhere."""
        self._take([_empty(piece) for piece in self._pieces])
        self._read_all()
        self._check_hash()

    def _finish(self) -> None:
        self._read(len(self._order.chunks) - 1)
        if self._hashes is not None:
            self._check_hash()
        for piece, tensors in zip(self._pieces, self._stored, strict=True):
            if not isinstance(piece.put, Tensor):
                piece.put(*tensors)
            elif tensors[0] is not piece.put:
                piece.put.copy_(tensors[0])
            if piece.after is not None:
                piece.after()
        self._stored, self._buffers = [], []

    def _read_all(self) -> None:
        for number in range(len(self._order.chunks)):
            self._read(number)

    def _read(self, number: int) -> None:
        """Read one of the chunks."""
        if not self._buffers:
            self._take([_memory_of(piece) for piece in self._pieces])
        chunk, buffers = self._order.chunks[number], []
        for part in self._order.parts[number]:
            buffer = self._buffers[part.index]
            is_whole = part.end - part.start == len(buffer.view)
            buffers.append(buffer if is_whole else buffer.part(part.start, part.end))
        chunk.file.reader.read(buffers, chunk.start, self._direct)

    def _take(self, stored: list[list[Tensor]]) -> None:
        """Use this memory for what is read, a tensor for every place."""
        self._stored = stored
        self._buffers = [
            self._buffer_of_slot(tensor) if tensor is piece.put else buffer_of(tensor)
            for piece, tensors in zip(self._pieces, stored, strict=True)
            for tensor in tensors
        ]

    def _check_hash(self) -> None:
        """Compare the hash of what was read, and read it again once if it is another."""
        assert self._hashes is not None, "there is nothing to compare with"
        expected, found = self._hashes.get(self._key), self._hash()
        if expected is None:
            self._hashes.learn(self._key, found)
            return
        if found == expected:
            return
        layer, expert = self._key
        log.warning("Expert %d of layer %d is read again: its hash was wrong.", expert, layer)
        for chunk in self._order.chunks:
            chunk.file.reader.forget(chunk.start, chunk.end - chunk.start)
        self._read_all()
        if self._hash() != expected:
            names = dict.fromkeys(chunk.file.path.name for chunk in self._order.chunks)
            raise DamagedExpertError(
                f"expert {expert} of layer {layer} has other bytes in {' and '.join(names)} than "
                f"{self._hashes.source}; {self._hashes.remedy}"
            )

    def _hash(self) -> int:
        state = xxhash.xxh3_64()
        for index in self._order.order:
            state.update(self._buffers[index].view)
        return state.intdigest()


def _memory_of(piece: Piece) -> list[Tensor]:
    """Return a tensor for each stored one: its final place if that can be read into."""
    if isinstance(piece.put, Tensor) and piece.places[0].entry.is_stored_as(piece.put):
        return [piece.put]
    return _empty(piece)


def _empty(piece: Piece) -> list[Tensor]:
    return [torch.empty(place.entry.shape, dtype=place.entry.dtype) for place in piece.places]
