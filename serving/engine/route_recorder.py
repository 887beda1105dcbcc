"""Record routes while a server runs: whatever happens to the file, answers go on."""

import logging
import threading
from pathlib import Path

from ...errors import ConfigError
from ...moe.batch import Batch
from ...moe.models.decoder import Decoder
from ...moe.routers.routing import Routing
from ...moe.routes.recorder import ForwardRows, OwnColumns, header_of, see_forwards
from ...moe.routes.writer import RouteWriter

log = logging.getLogger(__name__)

FLUSH_EVERY_S = 2.0
"""A replica that is killed loses the rows of this time at most."""


class RouteRecorder:
    """Records all forwards of a decoder until it is closed.

    Rows are gathered in the thread of the forwards, and another thread writes what has gathered
    every few seconds. A file that cannot be written any more ends the recording, with a warning.
    """

    def __init__(
        self,
        decoder: Decoder,
        path: Path,
        flush_every_s: float = FLUSH_EVERY_S,
        own: OwnColumns | None = None,
    ) -> None:
        header = header_of(decoder.config, decoder, written_by={"program": "serve"}, own=own)
        try:
            self._writer = RouteWriter(path, header)
        except OSError as error:
            raise ConfigError(
                f"record-routes {path} cannot be written ({error.strerror}); give another folder."
            ) from None
        self._rows = ForwardRows(own)
        self._flush_every_s = flush_every_s
        self._lock = threading.Lock()
        """The writer is used by two threads."""
        self._ended = threading.Event()
        self._handle = see_forwards(decoder, self._see)
        self._thread = threading.Thread(target=self._flush, name="routes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write the last rows and the end."""
        self._handle.remove()
        if not self._ended.is_set():
            with self._lock:
                try:
                    self._writer.close()
                except OSError as error:
                    self._warn(error)
        self._ended.set()
        self._thread.join()

    def _see(self, batch: Batch, routings: list[Routing]) -> None:
        if self._ended.is_set():
            return
        rows = self._rows(batch, routings)
        with self._lock:
            try:
                self._writer.add(rows)
            except OSError as error:
                self._warn(error)

    def _flush(self) -> None:
        while not self._ended.wait(self._flush_every_s):
            with self._lock:
                try:
                    self._writer.flush()
                except OSError as error:
                    self._warn(error)

    def _warn(self, error: OSError) -> None:
        self._ended.set()
        log.warning(
            "routes cannot be written into %s any more (%s); later rows are left out.",
            self._writer.path,
            error.strerror,
        )
