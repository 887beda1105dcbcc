"""The global batch as a pure function of (seed, step). B sequences, L tokens each."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import DataError
from .data import TrainingData
from .shards import TokenShard


class Batches(TrainingData, Protocol):
    """The global batches of text."""

    eos_id: int
    """The id that ends each document."""

    def sequences(self, step: int, rows: range) -> Tensor:
        """Return some rows of the global batch of ``step``: int64 ``[len(rows), L + 1]``."""
        ...


class ShuffledOrder:
    """Places 0, 1, ... in endless epochs, each a fresh permutation of ``num_items`` items."""

    def __init__(self, num_items: int, seed: int) -> None:
        self._num_items, self._seed = num_items, seed
        self._order = lru_cache(maxsize=2)(self._order_of_epoch)

    def item(self, place: int) -> int:
        """Return the item at a place."""
        epoch, index = divmod(place, self._num_items)
        return int(self._order(epoch)[index])

    def total(self, values: Sequence[int], places: range) -> int:
        """Return the sum of the values of the items at ``places``; an item may be there often."""
        count = self._num_items
        if len(places) <= count:
            return sum(values[self.item(place)] for place in places)
        epochs = places.stop // count - places.start // count
        before = [self._total_of_epoch(values, place) for place in (places.start, places.stop)]
        return epochs * sum(values) + before[1] - before[0]

    def _total_of_epoch(self, values: Sequence[int], place: int) -> int:
        """Return the sum of the values before ``place`` in its epoch."""
        start = place - place % self._num_items
        return sum(values[self.item(before)] for before in range(start, place))

    def _order_of_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        random = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        return random.permutation(self._num_items)


class GlobalBatches:
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
        self._batch = batch_sequences
        self.num_windows = (len(shard) - 1) // sequence_length
        if self.num_windows < 1:
            raise DataError(
                f"the {name} data hold {len(shard)} tokens, too few for one sequence of "
                f"train.sequence_length = {sequence_length}; give more text or lower it."
            )
        self._order = ShuffledOrder(self.num_windows, seed)

    def sequences(self, step: int, rows: range) -> Tensor:
        """Return some rows of the global batch of ``step``: int64 ``[len(rows), L + 1]``."""
        return self._windows([self._order.item(step * self._batch + row) for row in rows])

    def in_order(self, windows: Sequence[int]) -> Tensor:
        """Return windows by their number in the file, for evaluation."""
        return self._windows(list(windows))

    def wait_for(self, step: int) -> None:
        """Return immediately: a shard is complete on disk."""

    def forget_before(self, step: int) -> None:
        """Keep everything: each epoch reads it again."""

    def token_counts(self) -> list[int]:
        """Return how often each id occurs in the shard."""
        return self._shard.token_counts()

    def close(self) -> None:
        """Leave the shard to the garbage collector."""

    def _windows(self, indices: list[int]) -> Tensor:
        rows = [self._shard.slice(index * self._length, self._length + 1) for index in indices]
        if not rows:
            return torch.empty(0, self._length + 1, dtype=torch.int64)
        return torch.from_numpy(np.stack(rows))
