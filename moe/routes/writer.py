"""Write a route file while rows come, with memory for one chunk.

A killed writer loses the rows of its last chunk at most: what was written stays readable.
"""

from pathlib import Path

from .format import END, HEAD, LARGEST_CHUNK, TOTAL, RouteHeader, chunk, header_line, pack
from .reader import RouteFile
from .rows import Routes, joined

CHUNK_BYTES = 1 << 20
"""Rows are collected up to about this many bytes. A chunk's head costs 20 bytes, so a larger one
saves nothing; a smaller one is written more often while text is generated row by row."""


class RouteWriter:
    """Writes ``path``, replacing what is there. Raises ``OSError`` if that fails.

    When the next chunk would make the file longer than ``max_bytes``, later rows are left out.
    With ``append`` it goes on in a file that :func:`cut_after` prepared.
    """

    def __init__(
        self,
        path: Path,
        header: RouteHeader,
        max_bytes: int | None = None,
        append: bool = False,
    ) -> None:
        self.path = path
        self._header = header
        self._max_bytes = max_bytes
        self._waiting: list[Routes] = []
        self._waiting_bytes = 0
        self._sizes: dict[int, int] = {}
        """Bytes of a row by the number of its choices."""
        self.num_bytes = 0
        """Bytes of the file."""
        self.num_rows = 0
        """Rows in the file."""
        self.is_full = False
        """Whether rows were left out because of ``max_bytes``."""
        # A writer may be killed before the first line.
        goes_on = append and path.exists() and path.stat().st_size > 0
        if goes_on:
            self.num_rows = sum(len(routes) for routes in RouteFile(path).chunks())
            self.num_bytes = path.stat().st_size
        self._file = path.open("ab" if goes_on else "wb", buffering=0)
        if not goes_on:
            self._write(header_line(header))

    def add(self, routes: Routes) -> None:
        """Add rows; whole chunks are written."""
        if self.is_full or not len(routes):
            return
        row_bytes = self._row_bytes(routes)
        largest = max(1, LARGEST_CHUNK // 4 // row_bytes)
        if len(routes) > largest:
            for first in range(0, len(routes), largest):
                self.add(routes.select(slice(first, first + largest)))
            return
        self._waiting.append(routes)
        self._waiting_bytes += len(routes) * row_bytes
        if self._waiting_bytes >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added as a chunk."""
        if self.is_full or not self._waiting:
            return
        rows = joined(self._waiting)
        self._waiting, self._waiting_bytes = [], 0
        packed = pack(self._header, rows)
        assert len(packed) == HEAD.size + len(rows) * self._row_bytes(rows), "a column's shape"
        if self._max_bytes is not None and self.num_bytes + len(packed) > self._max_bytes:
            self.is_full = True
            return
        self._write(packed)
        self.num_rows += len(rows)

    def close(self) -> None:
        """Write the last rows and the end."""
        if self._file.closed:
            return
        try:
            self.flush()
            self._write(chunk(END, 0, 0, TOTAL.pack(self.num_rows)))
        finally:
            self._file.close()

    def _row_bytes(self, routes: Routes) -> int:
        choices = routes.experts_NLK.shape[2]
        if choices not in self._sizes:
            self._sizes[choices] = self._header.row_bytes(choices)
        return self._sizes[choices]

    def _write(self, data: bytes) -> None:
        """Write all of ``data``; after a failure the file ends where it did before."""
        before, view = self.num_bytes, memoryview(data)
        try:
            while view:
                written = self._file.write(view)
                view = view[written:]
        except OSError:
            self._file.truncate(before)
            self._file.close()
            raise
        self.num_bytes += len(data)


def cut_after(path: Path, last_step: int) -> None:
    """Remove the chunks that have rows of steps after ``last_step``, and the end.

    Chunks must be in the order of their steps. Rows can then be appended.
    """
    file = RouteFile(path)
    end = file.first_chunk
    for routes, after in file.chunks_and_ends():
        if routes.steps_N.max() > last_step:
            break
        end = after
    with path.open("r+b") as opened:
        opened.truncate(end)
