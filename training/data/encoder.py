"""Text to tokens, many texts at a time."""

import numpy as np
import numpy.typing as npt

from .tokenizer import Tokenizer

BATCH_CHARACTERS = 2 << 20
"""About 100 MB inside the tokenizers library, and enough text for all its threads."""
BATCH_TEXTS = 1024


class BatchEncoder:
    """Gathers pieces of documents into batches that keep the tokenizer's threads busy."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._eos = np.array([tokenizer.eos_id], dtype=np.uint32)
        self._texts: list[str] = []
        self._ends: list[bool] = []
        self._characters = 0

    def add(self, piece: str) -> npt.NDArray[np.uint32]:
        """Take a piece of a document; return the tokens of a full batch, or none."""
        return self._take(piece, ends_document=False)

    def end_document(self) -> npt.NDArray[np.uint32]:
        """End the document with eos; return the tokens of a full batch, or none."""
        return self._take("", ends_document=True)

    def _take(self, text: str, ends_document: bool) -> npt.NDArray[np.uint32]:
        self._texts.append(text)
        self._ends.append(ends_document)
        self._characters += len(text)
        if self._characters < BATCH_CHARACTERS and len(self._texts) < BATCH_TEXTS:
            return np.empty(0, dtype=np.uint32)
        return self.flush()

    def flush(self) -> npt.NDArray[np.uint32]:
        """Return the tokens of all pieces taken so far that have not been returned."""
        parts = [np.empty(0, dtype=np.uint32)]
        if self._texts:
            encoded = self._tokenizer.encode_batch(self._texts)
            for text, ids, ends in zip(self._texts, encoded, self._ends, strict=True):
                if text:  # some tokenizers put a mark before a text, even an empty one
                    parts.append(ids)
                if ends:
                    parts.append(self._eos)
        self._texts, self._ends, self._characters = [], [], 0
        return np.concatenate(parts)
