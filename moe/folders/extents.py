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


def on_disk(pieces: Sequence[Piece]) -> list[Place]:
    """Return all places in the order in which they are on disk."""
    places = [place for piece in pieces for place in piece.places]
    return sorted(places, key=lambda place: (place.file.path.name, place.entry.start))


def chunks_of(places: Sequence[Place]) -> list[Chunk]:
    """Return what is read to fill places that are in the order of the disk."""
    return [chunk for extent in _extents(places) for chunk in _cut(extent)]


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
