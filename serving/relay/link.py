"""A replica's connection to one proxy, which all its streams share.

The event loop and the engine's thread write to it. What all streams have to say after a step of
the engine leaves in one system call, and no other thread wakes for it. The proxy says nothing.
"""

import asyncio
import socket
import threading
from collections.abc import Callable


class Link:
    """Sends frames in the order in which they were added; belongs to one event loop."""

    def __init__(self, end: socket.socket) -> None:
        self.loop = asyncio.get_running_loop()
        self.is_open = True
        """Whether frames reach the proxy. False for ever once they do not."""
        self._end = end
        self._lock = threading.Lock()
        """Of the frames, and of the socket while something is sent."""
        self._frames: list[bytes] = []
        self._is_full = False
        """Whether the event loop waits until the socket takes more."""
        self._will_flush = False
        """Whether the event loop will flush when it has run what is ready now."""
        self.loop.add_reader(end, self._listen)

    def write(self, data: bytes) -> None:
        """Send a frame, together with those of other streams that are ready by then.

        For the event loop.
        """
        self.add(data)
        if not self._will_flush:
            self._will_flush = True
            self.loop.call_soon(self._flush_now)

    def add(self, data: bytes) -> bool:
        """Have the next :meth:`flush` send a frame; False if the proxy is gone."""
        with self._lock:
            if self.is_open:
                self._frames.append(data)
            return self.is_open

    def flush(self) -> None:
        """Send what the socket takes now; the rest follows when it takes more."""
        with self._lock:
            if not self._frames or self._is_full or not self.is_open:
                return
            data = b"".join(self._frames)
            try:
                sent = self._end.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:  # the proxy has ended
                self.is_open = False
                self._frames.clear()
                self._tell_loop(self.close)
                return
            self._frames = [data[sent:]] if sent < len(data) else []
            if self._frames:
                self._is_full = True
                self._tell_loop(self._wait_for_room)

    def close(self) -> None:
        """Send nothing more. For the event loop, or after its end."""
        with self._lock:
            self.is_open = False
            self._frames.clear()
            if self._end.fileno() >= 0 and not self.loop.is_closed():
                self.loop.remove_reader(self._end)
                self.loop.remove_writer(self._end)
            self._end.close()

    def _flush_now(self) -> None:
        self._will_flush = False
        self.flush()

    def _listen(self) -> None:
        """Close when the proxy has; it is the only news that can come."""
        try:
            is_over = not self._end.recv(1)
        except BlockingIOError:
            return
        except OSError:
            is_over = True
        if is_over:
            self.close()

    def _wait_for_room(self) -> None:
        if self.is_open:
            self.loop.add_writer(self._end, self._go_on)

    def _go_on(self) -> None:
        self.loop.remove_writer(self._end)
        self._is_full = False
        self.flush()

    def _tell_loop(self, callback: Callable[[], None]) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(callback)
