"""One expert on its way from disk into memory: read in chunks, checked, put where it belongs."""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
import xxhash
from torch import Tensor

from .expert_hashes import DamagedExpertError, ExpertHashes, Key
from .extents import Chunk, Piece, chunks_of, on_disk
from .file_reader import Buffer, buffer_of

log = logging.getLogger(__name__)


class ExpertRead:
    """Fills the pieces of an expert.

    Memory for what cannot be read straight into its place is taken when the first step runs, and
    given back after the last.
    """

    def __init__(
        self, key: Key, pieces: Sequence[Piece], hashes: ExpertHashes | None, direct: bool
    ) -> None:
        self._key = key
        self._pieces = pieces
        self._hashes = hashes
        self._direct = direct
        self._places = on_disk(pieces)
        self._chunks = chunks_of(self._places)
        self._stored: list[list[Tensor]] = []
        self._buffers: list[Buffer] = []

    def steps(self) -> list[Callable[[], None]]:
        """Return calls to be made one after the other; one that failed may be made again.

        They raise ``OSError`` if bytes cannot be read, and :class:`DamagedExpertError` if they are
        not those they should be.
        """
        *others, last = self._chunks
        return [*(partial(self._read, chunk) for chunk in others), partial(self._finish, last)]

    def check(self) -> None:
        """Read and check, and put nothing anywhere."""
        self._stored = [_empty(piece) for piece in self._pieces]
        self._buffers = self._on_disk(self._stored)
        for chunk in self._chunks:
            self._read(chunk)
        self._check_hash()

    def _finish(self, last: Chunk) -> None:
        self._read(last)
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

    def _read(self, chunk: Chunk) -> None:
        if not self._buffers:
            self._stored = [_memory_of(piece) for piece in self._pieces]
            self._buffers = self._on_disk(self._stored)
        parts = []
        for place, buffer in zip(self._places, self._buffers, strict=True):
            first = place.entry.start
            start, end = max(chunk.start, first), min(chunk.end, place.entry.end)
            if place.file is chunk.file and start < end:
                parts.append(buffer.part(start - first, end - first))
        chunk.file.reader.read(parts, chunk.start, self._direct)

    def _on_disk(self, stored: list[list[Tensor]]) -> list[Buffer]:
        """Return the memory of every place, in the order of the places."""
        buffers = {
            id(place): buffer_of(tensor)
            for piece, tensors in zip(self._pieces, stored, strict=True)
            for place, tensor in zip(piece.places, tensors, strict=True)
        }
        return [buffers[id(place)] for place in self._places]

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
        for chunk in self._chunks:
            chunk.file.reader.forget(chunk.start, chunk.end - chunk.start)
            self._read(chunk)
        if self._hash() != expected:
            files = " and ".join(dict.fromkeys(chunk.file.path.name for chunk in self._chunks))
            raise DamagedExpertError(
                f"expert {expert} of layer {layer} has other bytes in {files} than "
                f"{self._hashes.source}; {self._hashes.remedy}"
            )

    def _hash(self) -> int:
        state = xxhash.xxh3_64()
        for buffer in self._buffers:
            state.update(buffer.view)
        return state.intdigest()


def _memory_of(piece: Piece) -> list[Tensor]:
    """Return a tensor for each stored one: its final place if that can be read into."""
    if isinstance(piece.put, Tensor) and piece.places[0].entry.is_stored_as(piece.put):
        return [piece.put]
    return _empty(piece)


def _empty(piece: Piece) -> list[Tensor]:
    return [torch.empty(place.entry.shape, dtype=place.entry.dtype) for place in piece.places]
