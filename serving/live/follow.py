"""Look for new versions, read and check them, and hand them to the engine between two steps."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future

from ...kernels.values.memory import is_out_of_memory
from ...moe.updates.chain import path_to_newest
from ...moe.updates.folder import UpdatesFolder
from ...moe.updates.manifest import Manifest, UpdateError
from ...moe.updates.read import OpenUpdate
from .metrics import LiveMetrics
from .weights import LiveWeights, NewWeights, close_unused

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0

Exchange = Callable[[int, Callable[[], None]], "Future[None]"]
"""Calls the second argument between two steps; the first is the version of the new weights."""
FileState = tuple[tuple[str, int, int], ...]
"""Names, sizes and times of change of an update's files."""


class Follower:
    """Keeps a model at the newest version of a folder that can be had.

    A version that cannot be used changes nothing. It is logged once, and tried again only when its
    files have changed.
    """

    def __init__(
        self,
        folder: UpdatesFolder,
        weights: LiveWeights,
        exchange: Exchange,
        metrics: LiveMetrics,
        look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        self._folder, self._weights = folder, weights
        self._exchange, self.metrics = exchange, metrics
        self._look_every_s = look_every_s
        self._current: Manifest | None = None
        self._known: dict[int, Manifest] = {}
        self._bad: dict[int, FileState] = {}
        self._asked_after: int | None = None
        """The newest version when a full snapshot was last asked for."""
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)

    def start(self) -> None:
        """Look again and again, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        self._is_closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def look(self) -> None:
        """Take over the newest version that can be had, if it is newer."""
        there = self._folder.versions()
        self.metrics.newest = max(there, default=0)
        self._forget_old(there)
        self._read_manifests(there)
        while not self._is_closed.is_set():
            current = None if self._current is None else self._current.version
            good = {v: m.base for v, m in self._known.items() if v not in self._bad}
            path = path_to_newest(current, good)
            if not path:
                break
            try:
                self._take([self._known[version] for version in path])
            except UpdateError as error:
                self._refuse(error)
        self._ask_if_behind()

    def _take(self, versions: list[Manifest]) -> None:
        """Read versions, oldest first, and put them in place of the old weights together."""
        started = time.perf_counter()
        updates: list[OpenUpdate] = []
        new: NewWeights | None = None
        try:
            for manifest in versions:
                self._check_run(manifest)
                path = self._folder.of(manifest.version)
                updates.append(OpenUpdate(path, manifest, self._weights.family))
            new = self._read(updates)
            read_s = time.perf_counter() - started
            stall_s = self._put(versions[-1].version, new)
        except BaseException:
            new = None
            raise
        finally:
            close_unused(updates, new)
        self._current = versions[-1]
        self.metrics.apply(versions, read_s, stall_s)
        log.info(
            "weights are now version %d (step %d): %d units, read in %.2f s, put in %.0f ms.",
            *(self._current.version, self._current.step),
            *(sum(len(manifest.units) for manifest in versions), read_s, 1e3 * stall_s),
        )

    def _read(self, updates: list[OpenUpdate]) -> NewWeights:
        try:
            return self._weights.read(updates)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        version = updates[-1].manifest.version
        raise UpdateError(
            version,
            f"there is no memory for version {version}; the version before stays until the next.",
        )

    def _put(self, version: int, new: NewWeights) -> float:
        """Let the engine take new weights; return how long it stood still."""
        seconds: list[float] = []

        def swap() -> None:
            started = time.perf_counter()
            self._weights.put(new)
            seconds.append(time.perf_counter() - started)

        self._exchange(version, swap).result()
        return seconds[0]

    def _check_run(self, manifest: Manifest) -> None:
        if self._current is not None and manifest.run != self._current.run:
            raise UpdateError(
                manifest.version,
                f"version {manifest.version} is of run {manifest.run}, and this server follows run "
                f"{self._current.run}; start another server for the other run.",
            )

    def _forget_old(self, there: list[int]) -> None:
        """Forget versions that are gone, and take back those whose files have changed."""
        current = 0 if self._current is None else self._current.version
        self._known = {v: m for v, m in self._known.items() if v in there and v > current}
        for version, state in list(self._bad.items()):
            if version not in there or self._state_of(version) != state:
                del self._bad[version]
                self._known.pop(version, None)

    def _read_manifests(self, there: list[int]) -> None:
        current = 0 if self._current is None else self._current.version
        for version in there:
            if version <= current or version in self._known or version in self._bad:
                continue
            try:
                self._known[version] = self._folder.manifest(version)
            except UpdateError as error:
                self._refuse(error)

    def _refuse(self, error: UpdateError) -> None:
        log.warning("%s", error)
        self._bad[error.version] = self._state_of(error.version)
        self.metrics.refuse()

    def _state_of(self, version: int) -> FileState:
        try:
            found = [(path.name, path.stat()) for path in self._folder.of(version).iterdir()]
        except OSError:
            return ()
        return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found))

    def _ask_if_behind(self) -> None:
        """Ask for a full snapshot if newer versions cannot be reached; once for each newest."""
        current = 0 if self._current is None else self._current.version
        newest = self.metrics.newest
        if newest > current and self._asked_after != newest:
            self._asked_after = newest
            asked = self._folder.ask_for_full()
            how = "the publisher was asked for one" if asked else "the folder takes no wish for one"
            log.warning(
                "version %d cannot follow on version %d without a full snapshot; %s.",
                *(newest, current, how),
            )

    def _run(self) -> None:
        while not self._is_closed.wait(self._look_every_s):
            try:
                self.look()
            except CancelledError:
                return  # the engine has ended
            except OSError as error:
                log.warning("%s cannot be read (%s).", self._folder.path, error.strerror or error)
