"""From experts on disk and slots in memory to what the C++ queue reads by."""

import weakref
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from .....moe.folders.expert_layouts import ExpertViews
from .....moe.folders.expert_read import StraightRead
from .....moe.folders.folder import ModelFolder
from ...policies.policy import Key
from ...reads import Straight
from .library import Library

SHORTEST_BYTES = 241
"""The C++ hash takes no less (``SHORTEST`` of xxh3.h)."""
MOST_PIECES = 1024
"""Pieces of memory that one call may fill (``IOV_MAX``)."""


class _Plan(NamedTuple):
    address: int
    num_chunks: int
    num_bytes: int


class Plans:
    """The plans of a folder's experts, made when they are first read.

    An expert has one if its bytes go into a slot as they are, and if its hash is known.
    """

    def __init__(self, library: Library, folder: ModelFolder) -> None:
        self._library, self._folder = library, folder
        self._plans: dict[Key, _Plan | None] = {}
        self._parts_of: dict[int, tuple[ExpertViews, array[int]]] = {}
        """The addresses of a slot's parts by the id of its views, which are kept alive."""
        # When the program ends they stay: a thread may use one then.
        weakref.finalize(self, _free, library, self._plans).atexit = False

    def find(self, key: Key, views: ExpertViews) -> Straight | None:
        """Return how an expert gets into a slot; None if Python must read it."""
        plan = self._plans.get(key)
        if plan is None:
            if key in self._plans:
                return None
            found = self._folder.expert_read(*key, views).straight()
            if found is None:
                return None  # its hash may be known later
            plan = self._plans[key] = self._make(found, views)
            if plan is None:
                return None
        known = self._parts_of.get(id(views))
        if known is None:
            addresses = array("Q", (part.data_ptr() for part in _tensors(views)))
            known = self._parts_of[id(views)] = (views, addresses)
        return Straight(plan.address, known[1].buffer_info()[0], plan.num_chunks, plan.num_bytes)

    def _make(self, read: StraightRead, views: ExpertViews) -> _Plan | None:
        """Return a plan unless the hash, the system, or something else of the slot forbids it."""
        place_of = {(part.data_ptr(), part.nbytes): n for n, part in enumerate(_tensors(views))}
        parts = [place_of.get((tensor.data_ptr(), tensor.nbytes)) for tensor in read.tensors]
        num_bytes = sum(tensor.nbytes for tensor in read.tensors)
        most = max(map(len, read.order.parts))
        if set(parts) != set(place_of.values()) or num_bytes < SHORTEST_BYTES or most > MOST_PIECES:
            return None
        chunks, segments = array("q"), array("q")
        for chunk, pieces in zip(read.order.chunks, read.order.parts, strict=True):
            reader = chunk.file.reader
            direct = reader.direct if read.is_direct else None
            direct = -1 if direct is None else direct
            first = len(segments) // 3
            chunks.extend((reader.descriptor, direct, chunk.start, first, len(pieces)))
            for piece in pieces:
                part = parts[piece.index]
                assert part is not None, "all were found"
                segments.extend((part, piece.start, piece.end - piece.start))
        address = self._library.plan(
            *(chunks.buffer_info()[0], len(chunks) // 5),
            *(segments.buffer_info()[0], len(segments) // 3),
            read.digest,
        )
        if address is None:
            return None  # no memory is left for it
        return _Plan(address, len(read.order.chunks), num_bytes)


def _tensors(views: ExpertViews) -> Iterator[Tensor]:
    """Yield the tensors of a slot, always in the same order."""
    for view in views.values():
        if isinstance(view, Tensor):
            yield view
        else:
            yield from view


def _free(library: Library, plans: dict[Key, _Plan | None]) -> None:
    for plan in plans.values():
        if plan is not None:
            library.free_plan(plan.address)
