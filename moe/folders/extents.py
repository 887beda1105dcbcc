"""What an expert consists of, and how its bytes are read: neighbours together, in chunks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from .file_reader import PAGE_BYTES
from .safetensors_file import SafetensorsFile, TensorEntry

CHUNK_BYTES = 4 << 20
"""The most that is read at once, so that an early read can be laid aside between chunks."""


@dataclass(frozen=True, slots=True)
class Place:
    """Stored bytes: a tensor, or a part of one."""

    file: SafetensorsFile
    entry: TensorEntry

    def halves(self) -> tuple["Place", "Place"]:
        """Return the first and the second half of the rows."""
        rows, *others = self.entry.shape
        shape, num_bytes = (rows // 2, *others), self.entry.num_bytes // 2
        first, second = (
            TensorEntry(self.entry.dtype, shape, self.entry.start + half * num_bytes, num_bytes)
            for half in range(2)
        )
        return Place(self.file, first), Place(self.file, second)


@dataclass(frozen=True, slots=True)
class Piece:
    """Stored tensors that fill something together."""

    places: tuple[Place, ...]
    put: Tensor | Callable[..., None]
    """A tensor of the only place's shape, read into directly where type and layout agree and
    converted otherwise; or a call that gets the stored tensors and puts them where they belong."""
    after: Callable[[], None] | None = None
    """Called when the tensor is filled."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive bytes of a file."""

    file: SafetensorsFile
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes of a place that a chunk has."""

    index: int
    """Of the place, in the order of the pieces."""
    start: int
    """From the place's first byte on."""
    end: int


@dataclass(frozen=True, slots=True)
class DiskOrder:
    """How the places of some pieces are read; the same for whatever memory they go to."""

    order: tuple[int, ...]
    """Indices of the places, as they are on disk."""
    chunks: tuple[Chunk, ...]
    parts: tuple[tuple[Part, ...], ...]
    """What each chunk consists of."""


def disk_order(pieces: Sequence[Piece]) -> DiskOrder:
    """Return how all places of ``pieces`` are read."""
    places = places_of(pieces)
    order = sorted(
        range(len(places)), key=lambda i: (places[i].file.path.name, places[i].entry.start)
    )
    chunks = chunks_of([places[i] for i in order])
    parts = (tuple(_parts(chunk, places, order)) for chunk in chunks)
    return DiskOrder(tuple(order), tuple(chunks), tuple(parts))


def places_of(pieces: Sequence[Piece]) -> list[Place]:
    """Return all places in the order of the pieces."""
    return [place for piece in pieces for place in piece.places]


def chunks_of(places: Sequence[Place]) -> list[Chunk]:
    """Return what is read to fill places that are in the order of the disk."""
    return [chunk for extent in _extents(places) for chunk in _cut(extent)]


def _parts(chunk: Chunk, places: Sequence[Place], order: Sequence[int]) -> Iterator[Part]:
    for index in order:
        place = places[index]
        first = place.entry.start
        start, end = max(chunk.start, first), min(chunk.end, place.entry.end)
        if place.file is chunk.file and start < end:
            yield Part(index, start - first, end - first)


def _extents(places: Sequence[Place]) -> list[Chunk]:
    """Join places that are neighbours."""
    extents: list[Chunk] = []
    for place in places:
        start, end = place.entry.start, place.entry.end
        if extents and extents[-1].file is place.file and extents[-1].end == start:
            start = extents.pop().start
        extents.append(Chunk(place.file, start, end))
    return extents


def _cut(extent: Chunk) -> Iterator[Chunk]:
    """Cut an extent between pages, into chunks of about the same size."""
    first_page = extent.start // PAGE_BYTES * PAGE_BYTES
    num_bytes = extent.end - first_page
    num_chunks = -(-num_bytes // CHUNK_BYTES)
    step = -(-num_bytes // num_chunks // PAGE_BYTES) * PAGE_BYTES
    for page in range(first_page, extent.end, step):
        yield Chunk(extent.file, max(page, extent.start), min(page + step, extent.end))
