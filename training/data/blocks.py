"""A stream's tokens on disk, in blocks of a fixed number of windows. W windows, L tokens each."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from ...files import replace_text, replaced, sha256_of
from .hub import Position
from .token_stream import StreamPosition


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """The sidecar of a block, written last."""

    sha256: str
    end: StreamPosition
    """Where the next block's tokens begin in the data set."""


class Blocks:
    """Files ``block-00000000.bin``: W*L tokens, then the first token of the next block, so that
    every window has its L targets."""

    def __init__(self, folder: Path, num_windows: int, length: int, dtype: str) -> None:
        self.num_windows = num_windows
        self.num_tokens = num_windows * length
        """Tokens of a block, not counting the extra last one."""
        self._folder, self._length = folder, length
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._open = lru_cache(maxsize=4)(self._map)

    def write(self, index: int, tokens: npt.NDArray[np.uint32], end: StreamPosition) -> None:
        """Write a block so that a crash leaves all of it or nothing."""
        assert len(tokens) == self.num_tokens + 1, f"{len(tokens)} tokens in a block"
        raw = tokens.astype(self._dtype).tobytes()
        path = self._path(index)
        with replaced(path) as unfinished:
            unfinished.write_bytes(raw)
        facts = BlockFacts(hashlib.sha256(raw).hexdigest(), end)
        replace_text(path.with_suffix(".json"), json.dumps(asdict(facts)))

    def window(self, index: int, place: int) -> npt.NDArray[np.int64]:
        """Return the L + 1 tokens of a window as a fresh int64 array."""
        start = place * self._length
        return self._open(index)[start : start + self._length + 1].astype(np.int64)

    def tokens(self, index: int) -> npt.NDArray[np.int64]:
        """Return a block's tokens without the extra last one."""
        return self._open(index)[: self.num_tokens].astype(np.int64)

    def whole_from(self, first: int) -> int:
        """Return the first block from ``first`` on that is missing or damaged."""
        index = first
        while self._is_whole(index):
            index += 1
        return index

    def end_before(self, index: int) -> tuple[int, StreamPosition]:
        """Return the latest block up to ``index`` whose start is known, and that start."""
        known = sorted(map(_index_of, self._folder.glob("block-*.json")), reverse=True)
        for earlier in known:
            facts = self._facts(earlier) if earlier < index else None
            if facts is not None:
                return earlier + 1, facts.end
        return 0, StreamPosition()

    def forget_from(self, index: int) -> None:
        """Delete a block and those after it."""
        for path in self._folder.glob("block-*"):
            if _index_of(path) >= index:
                path.unlink()

    def forget_before(self, index: int) -> None:
        """Delete the blocks before ``index``, but keep the sidecar that says where it begins."""
        for path in self._folder.glob("block-*"):
            if _index_of(path) < index - (path.suffix == ".json"):
                path.unlink()

    def _is_whole(self, index: int) -> bool:
        facts, path = self._facts(index), self._path(index)
        return facts is not None and path.exists() and sha256_of(path) == facts.sha256

    def _facts(self, index: int) -> BlockFacts | None:
        try:
            text = self._path(index).with_suffix(".json").read_text(encoding="utf-8")
            values = json.loads(text)
            end = values["end"]
            batch = Position(**end.pop("batch"))
            return BlockFacts(values["sha256"], StreamPosition(batch=batch, **end))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _map(self, index: int) -> "np.memmap":
        path = self._path(index)
        try:
            return np.memmap(path, dtype=self._dtype, mode="r", shape=(self.num_tokens + 1,))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); every rank must see the run folder, so put "
                "run_dir on a file system that all hosts share."
            ) from error

    def _path(self, index: int) -> Path:
        return self._folder / f"block-{index:08d}.bin"


def _index_of(path: Path) -> int:
    return int(path.stem.removeprefix("block-"))
