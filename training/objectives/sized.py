"""What objectives share whose training data are items of different sizes."""

from ..data.shuffled import SizedItems
from .objective import M, Objective


class SizedObjective(Objective[M]):
    """Each row of the global batch is an item of :class:`.SizedItems`."""

    def window_rows(self, step: int, rows: range) -> list[int]:
        """See :meth:`Objective.window_rows`."""
        return self._items.num_rows_of(self._items.at(step, rows))

    def num_tokens(self, steps: range) -> int:
        """See :meth:`Objective.num_tokens`."""
        return self._items.num_rows(steps)

    @property
    def _items(self) -> SizedItems:
        train = self.data.train
        assert isinstance(train, SizedItems), "its data have other readers"
        return train
