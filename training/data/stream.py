"""Training on a data set while it is read: the global batch as a function of (seed, step).

The data set's tokens, in its own order and repeated without end, are cut into windows, and the
windows are grouped into blocks. Step s takes windows s*B to (s+1)*B. Within a block, windows are in
a random order that depends on (seed, block). Rank 0 writes blocks into the run folder ahead of
training; all ranks read them there. B sequences, L tokens each.
"""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...files import replace_text
from ...parallel.mesh import Mesh
from ..config import RunConfig
from ..stop import StopRequest
from .block_writer import BlockWriter
from .blocks import Blocks
from .hub import HubSource
from .shards import token_dtype
from .sources import open_source
from .stream_setup import num_block_windows, read_rule
from .token_stream import StreamPosition, TokenStream
from .tokenizer import Tokenizer

COUNTS = "token-counts.json"


class StreamBatches:
    """The global batches of a run that streams; call :func:`prepare_stream` first."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Tokenizer,
        folder: Path,
        mesh: Mesh,
        stop: StopRequest,
    ) -> None:
        self.eos_id = tokenizer.eos_id
        self._config, self._tokenizer = config, tokenizer
        self._folder, self._mesh = folder, mesh
        self._length, self._batch = config.train.sequence_length, config.train.batch_sequences
        windows = num_block_windows(config)
        self._blocks = Blocks(folder / "blocks", windows, self._length, token_dtype(tokenizer))
        ahead = -(-config.text_data.stream_ahead_tokens // self._blocks.num_tokens)
        self._writer = BlockWriter(self._blocks, self._open_stream, ahead, stop)
        self._ready = -1
        """Last block that is known to be written."""
        self._order = lru_cache(maxsize=4)(self._order_of_block)

    def sequences(self, step: int, rows: range) -> Tensor:
        """Return some rows of the global batch of ``step``: int64 ``[len(rows), L + 1]``.

        All ranks must ask for the same step, because they may have to wait for rank 0.
        """
        self.wait_for(step)
        found = [self._window(step * self._batch + row) for row in rows]
        if not found:
            return torch.empty(0, self._length + 1, dtype=torch.int64)
        return torch.from_numpy(np.stack(found))

    def wait_for(self, step: int) -> None:
        """Wait on all ranks until the windows of ``step`` are written.

        Raises the error that ended the reading, or :class:`Stopped` if rank 0 is asked to stop.
        """
        first = step * self._batch // self._blocks.num_windows
        last = ((step + 1) * self._batch - 1) // self._blocks.num_windows
        if last > self._ready:
            self._mesh.on_rank_0(lambda: self._writer.wait(first, last))
            self._ready = last

    def forget_before(self, step: int) -> None:
        """Delete, on rank 0, the blocks that only steps before ``step`` read."""
        if self._mesh.rank == 0:
            self._blocks.forget_before(step * self._batch // self._blocks.num_windows)

    def close(self) -> None:
        """End the reading."""
        self._writer.close()

    def token_counts(self) -> list[int]:
        """Return how often each id occurs in the first block; the same throughout the run."""
        path = self._folder / COUNTS
        self._mesh.on_rank_0(lambda: self._count(path))
        counts: list[int] = json.loads(path.read_text(encoding="utf-8"))
        return counts

    def _count(self, path: Path) -> None:
        if not path.exists():
            self._writer.wait(0, 0)
            counts = np.bincount(self._blocks.tokens(0), minlength=self._tokenizer.vocab_size)
            replace_text(path, json.dumps(counts.tolist()))

    def _open_stream(self, start: StreamPosition, pause: Callable[[float], object]) -> TokenStream:
        data = self._config.text_data
        source = open_source(data, data.source, data.split, "data.source")
        assert isinstance(source, HubSource), "only data sets are streamed"
        return TokenStream(source, self._tokenizer, read_rule(self._folder), start, pause)

    def _window(self, position: int) -> npt.NDArray[np.int64]:
        block, place = divmod(position, self._blocks.num_windows)
        return self._blocks.window(block, int(self._order(block)[place]))

    def _order_of_block(self, block: int) -> npt.NDArray[np.int64]:
        generator = np.random.Generator(np.random.PCG64([self._config.seed, block]))
        return generator.permutation(self._blocks.num_windows)
