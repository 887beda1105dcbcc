"""What the event loop need not see of an answer, for the engine's thread (engine/reader.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..engine.logprobs import TokenLogprob
from ..engine.sequence import GenerationEvent
from ..relay.sender import RelayedStream
from .chunks import Chunks


@dataclass(slots=True)
class Answer:
    """One answer, as generated so far."""

    text: str = ""
    finish_reason: str | None = None
    stop_token: int | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_tokens: int = 0
    cached_tokens: int = 0

    def add(self, event: GenerationEvent) -> None:
        """Add an event."""
        self.text += event.text
        self.logprobs += event.logprobs
        self.finish_reason = event.finish_reason
        self.stop_token = event.stop_token
        self.num_tokens = event.num_tokens
        self.cached_tokens = event.cached_tokens


class WholeAnswers:
    """Adds events to answers that are sent when they have ended."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers

    def take(self, index: int, event: GenerationEvent) -> bool:
        """See :class:`Outlet`."""
        self._answers[index].add(event)
        return True

    def flush(self) -> None:
        """Nothing leaves before the end."""


class PlainChunks:
    """Sends the chunks of a stream by its short way; they differ in nothing but their text."""

    def __init__(self, chunks: Chunks, way: RelayedStream) -> None:
        self._chunks, self._way = chunks, way

    def take(self, index: int, event: GenerationEvent) -> bool:
        """See :class:`Outlet`. The event loop ends the stream if the proxy is gone."""
        return not event.text or self._way.add(self._chunks.event(index, event, None))

    def flush(self) -> None:
        """See :class:`Outlet`."""
        self._way.flush()
