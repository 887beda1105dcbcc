"""The endless tokens of a data set: epoch after epoch, from any position."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from .documents import Text
from .encoder import BatchEncoder
from .held_out import digest_of
from .hub import HubReader, HubSource, Position
from .tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 20
"""Characters read and tokenised together; resuming from a position repeats at most these."""
BATCH_DOCUMENTS = 512


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """A place between two tokens, in JSON types."""

    batch: Position = field(default_factory=Position)
    """Beginning of the documents that were tokenised together."""
    epoch: int = 0
    used: int = 0
    """Tokens of that batch before this place."""


@dataclass(frozen=True, slots=True)
class HeldOutRule:
    """What of the data set is not trained on."""

    every: int | None
    """Rows 0, n, 2n, ... are held out; None if held-out text has a separate source."""
    digests: frozenset[bytes]
    """Hashes of evaluated documents, whose copies are not trained on either."""

    def is_held_out(self, row: int, text: str) -> bool:
        """Say whether a document must not be trained on."""
        if self.every is None:
            return False
        return row % self.every == 0 or digest_of(Text(text)) in self.digests


class TokenStream:
    """Documents in the order of the data set, each ended by eos."""

    def __init__(
        self,
        source: HubSource,
        tokenizer: Tokenizer,
        rule: HeldOutRule,
        start: StreamPosition,
        pause: Callable[[float], object],
    ) -> None:
        self._source, self._tokenizer, self._rule = source, tokenizer, rule
        self._pause = pause
        self._reader = HubReader(source, start.batch, pause)
        self._epoch = start.epoch
        self.position = replace(start, used=0)
        """The place after the last token taken."""
        self._tokens = np.empty(0, dtype=np.uint32)
        if start.used:
            self._next_batch()
            if len(self._tokens) < start.used:
                raise DataError(
                    f"{source} has changed since this run began: a document is shorter; "
                    "bring the old data back or use a new run_dir."
                )
            self.position = start

    def take(self, count: int) -> npt.NDArray[np.uint32]:
        """Return the next ``count`` tokens."""
        parts = []
        while count:
            self._fill()
            used = self.position.used
            part = self._tokens[used : used + count]
            parts.append(part)
            count -= len(part)
            self.position = replace(self.position, used=used + len(part))
        return np.concatenate(parts)

    def peek(self) -> int:
        """Return the next token without taking it."""
        self._fill()
        return int(self._tokens[self.position.used])

    def close(self) -> None:
        """Close open files."""
        self._reader.close()

    def _fill(self) -> None:
        while self.position.used == len(self._tokens):
            self._next_batch()

    def _next_batch(self) -> None:
        for _ in range(2):  # the rest of this epoch, then at most one whole epoch
            start = self._reader.position
            texts = self._read_texts()
            if texts:
                self._tokens = self._encode(texts)
                self.position = StreamPosition(start, self._epoch)
                return
            self._reader.close()
            self._reader = HubReader(self._source, Position(), self._pause)
            self._epoch += 1
        raise DataError(f"{self._source} holds no text to train on; give a data set with some.")

    def _read_texts(self) -> list[str]:
        texts: list[str] = []
        characters = 0
        while characters < BATCH_CHARACTERS and len(texts) < BATCH_DOCUMENTS:
            try:
                text = self._reader.next_text()
            except DataError:
                if not texts:
                    raise
                break  # return what was read; the next call fails again
            if text is None:
                break
            if not self._rule.is_held_out(self._reader.position.documents - 1, text):
                texts.append(text)
                characters += len(text)
        return texts

    def _encode(self, texts: list[str]) -> npt.NDArray[np.uint32]:
        encoder, parts = BatchEncoder(self._tokenizer), []
        for text in texts:
            parts += [encoder.add(piece) for piece in Text(text)]
            parts.append(encoder.end_document())
        return np.concatenate([*parts, encoder.flush()])
