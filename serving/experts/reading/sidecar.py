"""Hashes of experts in ordinary folders, learned at the first read and kept in the cache folder.

A change after that first read is noticed, one before it is not. The file belongs to the weights as
they are now: their names, sizes, times of change and inodes are in it, and other weights begin
anew. Processes that serve the same folder add to the same file.
"""

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import xxhash

from ....files import read_small_file
from ....moe.folders.expert_hashes import MAX_BYTES, Key, parse, render
from ....moe.folders.folder import ModelFolder

log = logging.getLogger(__name__)

FOLDER = "moeyard/expert-hashes"
"""In the user's cache folder, $XDG_CACHE_HOME or ~/.cache."""
PAUSE_S = 5.0
"""Seconds between two writes; :meth:`LearnedHashes.save` writes the rest."""


class LearnedHashes:
    """Hashes that are known from earlier reads."""

    def __init__(self, folder: ModelFolder) -> None:
        self._path = _path_of(folder.path)
        self._weights = _state_of(folder)
        self._lock = threading.Lock()
        self._hashes = self._read()
        self._num_saved = len(self._hashes)
        self._saved_at = time.monotonic()

    source = "at its first read"

    @property
    def remedy(self) -> str:
        """What to do about an expert that has another hash."""
        if self._path is None:
            return "copy the folder again"
        return (
            f"copy the folder again, or delete {self._path.name} in the cache folder "
            f"{FOLDER} if you trust the weights as they are"
        )

    def get(self, key: Key) -> int | None:
        """Return the hash of an expert, None if it is not known."""
        return self._hashes.get(key)

    def learn(self, key: Key, digest: int) -> None:
        """Keep the hash of an expert that was not known."""
        with self._lock:
            self._hashes.setdefault(key, digest)
            is_time = time.monotonic() - self._saved_at > PAUSE_S
        if is_time:
            self.save()

    def save(self) -> None:
        """Write what is new, together with what other processes wrote meanwhile."""
        with self._lock:
            if self._path is None or len(self._hashes) == self._num_saved:
                return
            for key, digest in self._read().items():
                self._hashes[key] = digest  # who was first is right
            try:
                _replace(self._path, render(self._hashes.items(), {"weights": self._weights}))
            except OSError as error:
                log.warning("Hashes of experts cannot be kept (%s); they are in memory.", error)
                self._path = None
            self._num_saved, self._saved_at = len(self._hashes), time.monotonic()

    def _read(self) -> dict[Key, int]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            values = json.loads(read_small_file(self._path, MAX_BYTES))
            hashes = parse(values)
        except (OSError, ValueError, RecursionError) as error:
            log.warning("%s is damaged (%s) and is written anew.", self._path, error)
            return {}
        return hashes if values.get("weights") == self._weights else {}


def _path_of(folder: Path) -> Path | None:
    """Return where a folder's hashes are kept; None where there is no place."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None  # no home folder
    name = xxhash.xxh3_64_hexdigest(str(folder.resolve()).encode(errors="surrogateescape"))
    return root / FOLDER / f"{name}.json"


def _state_of(folder: ModelFolder) -> dict[str, Any]:
    """Return what changes when weights are replaced or written to."""
    found: dict[str, Any] = {}
    for path in folder.files.paths:
        status = path.stat()
        found[path.name] = [status.st_size, status.st_mtime_ns, status.st_ino]
    return {"folder": str(folder.path.resolve()), "files": found}


def _replace(path: Path, text: str) -> None:
    """Write a file whole; processes and threads that do so at once do not disturb each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
