"""The thread that writes checkpoints, and the wait for it."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager

import torch

from ...errors import TrainingError
from ...parallel.experts.lane import Lane
from ...parallel.watch.pulse import MOVE_S, pulse, thread_cpu_s
from ...parallel.watch.watch import Watch

LOOK_EVERY_S = 0.2
"""The main thread looks this often whether the writing thread and the other ranks are well."""


class Writer:
    """Writes one checkpoint at a time. Training may go on meanwhile."""

    def __init__(self, watch: Watch | None) -> None:
        self._watch = watch
        self._lane: Lane | None = None
        self._under_way: Future[None] | None = None
        self._thread = 0
        self._is_in_files = False

    def start(
        self, write: Callable[[], None], failed: Callable[[BaseException], None] | None = None
    ) -> None:
        """Run ``write`` in the thread, which calls ``failed`` with its error.

        Nothing may be under way.
        """
        assert self.is_free, "call wait() first"
        self._lane = self._lane or Lane("saves")
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def run() -> None:
            self._thread = threading.get_ident()
            if device is not None:
                torch.cuda.set_device(device)
            try:
                write()
            except BaseException as error:
                if failed is not None:
                    failed(error)
                raise

        self._under_way = self._lane.submit(run)

    @property
    def is_free(self) -> bool:
        """Whether nothing is under way whose end has not been seen."""
        return self._under_way is None

    def wait(self) -> None:
        """Wait until nothing is under way, and raise the error that ended it.

        Files may take any time while the thread uses some of the processor. Raises
        :class:`TrainingError` if it uses none for ``parallel.timeout_s``, and
        :class:`LostRankError` if another rank is lost.
        """
        if self._under_way is None:
            return
        future, self._under_way = self._under_way, None
        if self._watch is not None:
            self._wait_while_it_moves(future, self._watch)
        future.result()

    @contextmanager
    def in_files(self) -> Iterator[None]:
        """Note that the thread works on files, and does not wait for other ranks."""
        self._is_in_files = True
        try:
            yield
        finally:
            self._is_in_files = False

    def _wait_while_it_moves(self, future: "Future[None]", watch: Watch) -> None:
        moved, cpu_s = time.monotonic(), 0.0
        while not future.done():
            wait([future], LOOK_EVERY_S)
            watch.check()
            now = time.monotonic()
            used_s = thread_cpu_s(self._thread) if self._thread else 0.0
            if used_s - cpu_s > MOVE_S or not self._is_in_files:
                moved, cpu_s = now, used_s
                pulse.note()
            elif now - moved > watch.timeout_s:
                raise TrainingError(
                    f"rank {watch.rank} has written nothing for parallel.timeout_s = "
                    f"{watch.timeout_s:g} {pulse.doing}; look at the file system of run_dir, or "
                    "raise the limit, and start again."
                )
