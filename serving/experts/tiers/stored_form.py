"""The bytes of a slot in one piece: what host memory keeps of an expert.

The parts follow each other in the order of ``slot_views``, as they are in a slot, quantized or not.
So filling a slot copies bytes and converts nothing. A checksum follows, since shared memory is
under no one's eyes for days.
"""

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import torch
import xxhash
from torch import Tensor

from ....moe.folders.expert_hashes import FILE as HASHES
from ....moe.folders.expert_layouts import ExpertViews
from ....moe.folders.folder import ModelFolder
from ....moe.routes.identity import identity_of

CHECKSUM_BYTES = 8
"""Of xxh3, at the end. On one core it checks bytes twice as fast as they can be copied: 64 against
32 GB/s from the cache of an AMD EPYC."""
FORM = 1
"""Number of this form. It is a part of :func:`name_of_bytes`, so forms never mix."""


def num_bytes_of(views: ExpertViews) -> int:
    """Return the bytes of an expert in this form."""
    return sum(part.nbytes for part in _parts(views)) + CHECKSUM_BYTES


def copy_out(views: ExpertViews, stored: np.ndarray) -> None:
    """Copy a slot's parts into ``stored``, uint8 of :func:`num_bytes_of` elements."""
    start = 0
    for part in _parts(views):
        np.copyto(stored[start : start + part.nbytes], _bytes_of(part))
        start += part.nbytes
    stored[start:] = _checksum(stored[:start])


def copy_in(views: ExpertViews, stored: np.ndarray) -> bool:
    """Fill a slot's parts from ``stored``, which may be read-only shared memory.

    Returns False, and leaves the slot as it was, if ``stored`` is not whole.
    """
    if stored.nbytes != num_bytes_of(views):
        return False
    if not np.array_equal(_checksum(stored[:-CHECKSUM_BYTES]), stored[-CHECKSUM_BYTES:]):
        return False
    start = 0
    for part in _parts(views):
        piece = stored[start : start + part.nbytes]
        start += part.nbytes
        if part.is_cpu and part.is_contiguous():
            np.copyto(_bytes_of(part), piece)
        else:  # through memory of this process: torch takes no read-only array
            part.copy_(torch.from_numpy(piece.copy()).view(part.dtype).view(part.shape))
    return True


def name_of_bytes(folder: ModelFolder, dtype: torch.dtype) -> str:
    """Return a short name for a folder's experts in the form of slots of ``dtype``.

    Folders with the hashes of their experts have the same name if those are equal. Other folders
    have it only if their files have the same names, sizes and times of change.
    """
    values = [FORM, identity_of(folder.config).architecture, str(dtype), str(_formats(folder))]
    digest = hashlib.sha256(json.dumps(values).encode())
    hashes = folder.path / HASHES
    if hashes.exists():
        digest.update(hashes.read_bytes())
    else:
        for file in sorted(folder.path.resolve().glob("*.safetensors")):
            found = file.stat()
            digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _formats(folder: ModelFolder) -> object:
    """Return what tells the experts' formats apart."""
    kinds, kind_of = folder.formats.kinds, folder.formats.kind_of
    return kinds[0] if len(kinds) == 1 else (kinds, sorted(kind_of.items()))


def _parts(views: ExpertViews) -> Iterator[Tensor]:
    for view in views.values():
        if isinstance(view, Tensor):
            yield view
        else:
            yield from view


def _bytes_of(part: Tensor) -> np.ndarray:
    """Return a part's memory as uint8."""
    source = part if part.is_cpu else part.cpu()
    flat: np.ndarray = source.detach().contiguous().view(torch.uint8).reshape(-1).numpy()
    return flat


def _checksum(stored: np.ndarray) -> np.ndarray:
    return np.frombuffer(xxhash.xxh3_64_digest(stored.data), np.uint8)
