"""Memory-mapped token shards: little-endian ids in ``.bin``, facts about them in ``.json``."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from ...files import replace_text, sha256_of
from .encoder import BatchEncoder
from .tokenizer import Tokenizer

FORMAT = "moeyard-tokens"
VERSION = 1
DTYPES = ("uint16", "uint32")


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """The sidecar."""

    dtype: str
    """uint16 or uint32."""
    num_tokens: int
    num_bytes: int
    """UTF-8 bytes of the text that was tokenised, for losses per byte."""
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    file_sha256: str
    source_sha256: str
    """Hash of the text the shard was made from."""
    source_fingerprint: str | None = None
    """Hash of the source files' names, sizes and times of change."""
    format: str = FORMAT
    version: int = VERSION


class TokenShard:
    """A shard opened for reading."""

    def __init__(self, path: Path, facts: ShardFacts) -> None:
        self.facts = facts
        self._tokens = np.memmap(path, dtype=np.dtype(facts.dtype).newbyteorder("<"), mode="r")

    def __len__(self) -> int:
        return self.facts.num_tokens

    def slice(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Return ``length`` ids from ``start`` as a fresh int64 array."""
        return self._tokens[start : start + length].astype(np.int64)

    def check_ids(self, path: Path, vocab_size: int) -> None:
        """Raise :class:`DataError` when some id is not in the vocabulary."""
        for start in range(0, len(self), 1 << 24):
            largest = int(self._tokens[start : start + (1 << 24)].max())
            if largest >= vocab_size:
                raise DataError(
                    f"shard {path} holds token id {largest}, but the tokenizer's ids are below "
                    f"{vocab_size}; make the shard again."
                )

    def token_counts(self) -> list[int]:
        """Return how often each id occurs."""
        counts = np.zeros(self.facts.vocab_size, dtype=np.int64)
        for start in range(0, len(self), 1 << 24):
            chunk = self._tokens[start : start + (1 << 24)]
            counts += np.bincount(chunk, minlength=self.facts.vocab_size)
        return counts.tolist()


class ShardWriter:
    """Writes a shard document by document; without :meth:`finish` there is no shard."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self.num_tokens = 0
        self._path, self._tokenizer = path, tokenizer
        self._dtype = token_dtype(tokenizer)
        self._digest, self._source_digest = hashlib.sha256(), hashlib.sha256()
        self._num_bytes = 0
        self._encoder = BatchEncoder(tokenizer)
        path.with_suffix(".json").unlink(missing_ok=True)
        self._file = path.open("wb")

    def add(self, document: Iterable[str]) -> None:
        """Append a document's pieces and eos; its tokens are written in a later batch."""
        text_digest = hashlib.sha256()
        for piece in document:
            raw = piece.encode()
            text_digest.update(raw)
            self._num_bytes += len(raw)
            self._write(self._encoder.add(piece))
        self._write(self._encoder.end_document())
        self._source_digest.update(text_digest.digest())

    def flush(self) -> None:
        """Tokenise and write everything added so far."""
        self._write(self._encoder.flush())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def finish(self, fingerprint: str | None) -> None:
        """Flush the tokens to disk, then write the sidecar."""
        self.flush()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        facts = ShardFacts(
            dtype=self._dtype,
            num_tokens=self.num_tokens,
            num_bytes=self._num_bytes,
            vocab_size=self._tokenizer.vocab_size,
            eos_id=self._tokenizer.eos_id,
            tokenizer_sha256=self._tokenizer.sha256,
            file_sha256=self._digest.hexdigest(),
            source_sha256=self._source_digest.hexdigest(),
            source_fingerprint=fingerprint,
        )
        sidecar = json.dumps(asdict(facts), indent=2) + "\n"
        replace_text(self._path.with_suffix(".json"), sidecar)

    def _write(self, ids: npt.NDArray[np.uint32]) -> None:
        if len(ids):
            raw = ids.astype(np.dtype(self._dtype).newbyteorder("<")).tobytes()
            self._file.write(raw)
            self._digest.update(raw)
            self.num_tokens += len(ids)


def token_dtype(tokenizer: Tokenizer) -> str:
    """Return the narrower of the shard types that holds the tokenizer's ids."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def hash_of_documents(documents: Iterable[Iterable[str]]) -> str:
    """Return the ``source_sha256`` of a shard of these documents."""
    digest = hashlib.sha256()
    for document in documents:
        text_digest = hashlib.sha256()
        for piece in document:
            text_digest.update(piece.encode())
        digest.update(text_digest.digest())
    return digest.hexdigest()


def read_facts(path: Path) -> ShardFacts:
    """Read a shard's sidecar."""
    sidecar = path.with_suffix(".json")
    try:
        values: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))
        facts = ShardFacts(**values)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"shard {path} has no usable sidecar {sidecar.name} ({reason}); make the shard again."
        ) from None
    if facts.dtype not in DTYPES:
        raise DataError(f"shard {path} has dtype {facts.dtype!r}; it must be uint16 or uint32.")
    if (facts.format, facts.version) != (FORMAT, VERSION):
        raise DataError(
            f"shard {path} is {facts.format} version {facts.version}; "
            f"this release reads {FORMAT} version {VERSION}."
        )
    return facts


def open_shard(path: Path, tokenizer: Tokenizer, verify: bool) -> TokenShard:
    """Open a shard made with ``tokenizer``; ``verify`` also checks the file's hash."""
    facts = read_facts(path)
    if facts.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"shard {path} was made with tokenizer {facts.tokenizer_sha256[:12]}, but "
            f"data.tokenizer is {tokenizer.sha256[:12]}; use the same one or make the shard again."
        )
    expected = facts.num_tokens * np.dtype(facts.dtype).itemsize
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise DataError(
            f"shard {path} has {size} bytes, its sidecar says {expected}; make the shard again."
        )
    if size == 0:
        raise DataError(f"shard {path} holds no tokens; give a corpus with some text.")
    shard = TokenShard(path, facts)
    if verify:
        if sha256_of(path) != facts.file_sha256:
            raise DataError(f"shard {path} does not match its sidecar's hash; make it again.")
        shard.check_ids(path, tokenizer.vocab_size)
    return shard
