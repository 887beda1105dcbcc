"""Training data that are whole before the first step, in a fresh random order each epoch."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt


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


class ShuffledItems:
    """The base of readers of whole data: their items in a fresh random order each epoch.

    Which items a global batch has depends on the seed and the step alone. A rank asks for those of
    its rows, and a resumed run for those of its next step, so there is nothing to restore.
    """

    def __init__(self, num_items: int, batch: int, seed: int) -> None:
        """``batch`` is the items of a global batch."""
        self._num_items, self._batch = num_items, batch
        self._order = ShuffledOrder(num_items, seed)

    def __len__(self) -> int:
        return self._num_items

    def at(self, step: int, rows: range) -> list[int]:
        """Return the items of some rows of the global batch of ``step``, by their number."""
        return [self._order.item(step * self._batch + row) for row in rows]

    def wait_for(self, step: int) -> None:
        """Return immediately: the data are whole."""

    def forget_before(self, step: int) -> None:
        """Keep everything: each epoch reads it again."""

    def token_counts(self) -> list[int]:
        """Return nothing: the items have no token ids."""
        return []

    def close(self) -> None:
        """Leave arrays and files to the garbage collector."""


class SizedItems(ShuffledItems):
    """Items that differ in the number of rows that the model computes for them."""

    def __init__(self, rows_of_items: Sequence[int], batch: int, seed: int) -> None:
        """``batch`` is the items of a global batch."""
        super().__init__(len(rows_of_items), batch, seed)
        self._rows_of_items = rows_of_items

    def num_rows_of(self, items: Sequence[int]) -> list[int]:
        """Return the rows of each of ``items``."""
        return [self._rows_of_items[item] for item in items]

    def num_rows(self, steps: range) -> int:
        """Return the rows of the global batches of ``steps``."""
        places = range(steps.start * self._batch, steps.stop * self._batch)
        return self._order.total(self._rows_of_items, places)

    @property
    def epoch_rows(self) -> int:
        """Rows of all items."""
        return sum(self._rows_of_items)
