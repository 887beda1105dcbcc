"""The model folder as a tier."""

import time
from collections.abc import Callable
from functools import partial

from torch import Tensor

from ....moe.folders.expert_hashes import DamagedExpertError
from ....moe.folders.expert_layouts import ExpertViews
from ....moe.folders.file_reader import Buffer, buffer_of
from ....moe.folders.folder import ModelFolder
from ..policies.policy import Key
from ..reading.native.plans import Plans
from ..reads import Straight

READ_ATTEMPTS = 3
RETRY_PAUSE_S = 0.05


class DiskTier:
    """The model folder. A read that fails is tried again before it counts as failed."""

    def __init__(self, folder: ModelFolder, plans: Plans | None = None) -> None:
        """``plans`` are for a queue of C++."""
        self._folder = folder
        self._plans = plans
        self._buffers: dict[tuple[int, int], Buffer] = {}
        """Of each part of each slot: making one takes longer than its hash."""

    def straight(self, key: Key, views: ExpertViews) -> Straight | None:
        """Return how C++ reads an expert; None if it cannot."""
        return None if self._plans is None else self._plans.find(key, views)

    def reads(self, key: Key, views: ExpertViews) -> list[Callable[[], None]]:
        """Return one call per chunk, to be made one after the other."""
        layer, expert = key
        calls = self._folder.expert_reads(layer, expert, views, self._buffer_of)
        return [partial(read_patiently, call) for call in calls]

    def _buffer_of(self, tensor: Tensor) -> Buffer:
        """Return the memory of a slot's part, which stays where it is."""
        key = tensor.data_ptr(), tensor.nbytes
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = buffer_of(tensor)
        return buffer


def read_patiently(read: Callable[[], None]) -> None:
    """Try again: a disk or a network file system may fail for a moment."""
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            read()
            return
        except DamagedExpertError:
            raise  # it was read twice
        except OSError:
            if attempt == READ_ATTEMPTS:
                raise
            time.sleep(RETRY_PAUSE_S * attempt)
