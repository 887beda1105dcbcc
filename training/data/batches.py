"""The global batch as a pure function of (seed, step). B sequences, L tokens each."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from .data import TrainingData
from .shards import TokenShard
from .shuffled import ShuffledItems


class Batches(TrainingData, Protocol):
    """The global batches of text."""

    eos_id: int
    """The id that ends each document."""

    def sequences(self, step: int, rows: range) -> Tensor:
        """Return some rows of the global batch of ``step``: int64 ``[len(rows), L + 1]``."""
        ...


class GlobalBatches(ShuffledItems):
    """Windows of a shard in a fresh random order each epoch.

    Window n covers tokens ``n*L`` to ``(n+1)*L`` inclusive: L inputs and their L targets.
    """

    def __init__(
        self,
        shard: TokenShard,
        sequence_length: int,
        batch_sequences: int,
        seed: int,
        name: str = "training",
    ) -> None:
        self.eos_id = shard.facts.eos_id
        self._shard = shard
        self._length = sequence_length
        num_windows = (len(shard) - 1) // sequence_length
        if num_windows < 1:
            raise DataError(
                f"the {name} data hold {len(shard)} tokens, too few for one sequence of "
                f"train.sequence_length = {sequence_length}; give more text or lower it."
            )
        super().__init__(num_windows, batch_sequences, seed)

    def sequences(self, step: int, rows: range) -> Tensor:
        """Return some rows of the global batch of ``step``: int64 ``[len(rows), L + 1]``."""
        return self._windows(self.at(step, rows))

    def in_order(self, windows: Sequence[int]) -> Tensor:
        """Return windows by their number in the file, for evaluation."""
        return self._windows(list(windows))

    def token_counts(self) -> list[int]:
        """Return how often each id occurs in the shard."""
        return self._shard.token_counts()

    def _windows(self, indices: list[int]) -> Tensor:
        rows = [self._shard.slice(index * self._length, self._length + 1) for index in indices]
        if not rows:
            return torch.empty(0, self._length + 1, dtype=torch.int64)
        return torch.from_numpy(np.stack(rows))
