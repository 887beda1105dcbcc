"""The events of one stream as bytes. What all chunks of a stream share is encoded once."""

import json
import uuid
from typing import Any, Protocol

from ..engine.sequence import GenerationEvent
from .responses import sse


class ChunkWording(Protocol):
    """How an endpoint words the chunks of one stream."""

    @property
    def is_plain(self) -> bool:
        """Whether chunks differ in nothing but their text while an answer goes on."""
        ...

    def chunk(self, index: int, event: GenerationEvent) -> dict[str, Any]:
        """Return the choice that carries one event."""
        ...


class Chunks:
    """Server-sent events of one stream, the same bytes as :func:`sse` would make."""

    def __init__(self, head: dict[str, Any], wording: ChunkWording) -> None:
        self._head = head
        self._wording = wording
        self._plain: dict[int, tuple[bytes, bytes]] = {}
        """By choice: what stands before a chunk's text, and after it."""

    def event(self, index: int, event: GenerationEvent, usage: dict[str, Any] | None) -> bytes:
        """Return the chunk of an event; ``usage`` stands in it unless it is None."""
        if event.finish_reason is None and usage is None and self._wording.is_plain and event.text:
            before, after = self._plain.get(index) or self._template(index)
            return b"%b%b%b" % (before, json.dumps(event.text).encode(), after)
        return self.choice(self._wording.chunk(index, event), usage)

    def choice(self, choice: dict[str, Any], usage: dict[str, Any] | None) -> bytes:
        """Return the chunk of a choice."""
        values = {**self._head, "choices": [choice]}
        return sse(values if usage is None else {**values, "usage": usage})

    def _template(self, index: int) -> tuple[bytes, bytes]:
        mark = uuid.uuid4().hex
        whole = self.choice(self._wording.chunk(index, GenerationEvent("", mark, 1)), None)
        before, after = whole.split(json.dumps(mark).encode())
        self._plain[index] = before, after
        return before, after
