"""The model folder as a tier."""

import time
from collections.abc import Callable
from functools import partial

from ....moe.folders.expert_hashes import DamagedExpertError
from ....moe.folders.expert_layouts import ExpertViews
from ....moe.folders.folder import ModelFolder
from ..policies.policy import Key

READ_ATTEMPTS = 3
RETRY_PAUSE_S = 0.05


class DiskTier:
    """The model folder. A read that fails is tried again before it counts as failed."""

    def __init__(self, folder: ModelFolder) -> None:
        self._folder = folder

    def reads(self, key: Key, views: ExpertViews) -> list[Callable[[], None]]:
        """Return one call per chunk, to be made one after the other."""
        layer, expert = key
        calls = self._folder.expert_reads(layer, expert, views)
        return [partial(_read_patiently, call) for call in calls]


def _read_patiently(read: Callable[[], None]) -> None:
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
