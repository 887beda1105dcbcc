"""What a decoder keeps of the targets it writes: all of them grow together.

B targets, Q heads, H head width, L positions, S source positions, C sources.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..attention.relative import KeysValues
from ..batch import Batch


class TargetCaches:
    """Keys and values of past target rows, and those of the sources, computed once.

    Targets of a source are neighbours: with C sources, target b writes for source ``b * C // B``.
    """

    def __init__(
        self, sources: Sequence[KeysValues], mask_C11S: Tensor | None, num_targets: int, room: int
    ) -> None:
        """``sources`` has each layer's keys and values; ``room`` is the longest target."""
        self.sources = sources
        """By layer of the decoder."""
        self.mask_C11S = mask_C11S
        """Added to scores of the sources' keys; None = no padding."""
        self.num_targets = num_targets
        """B."""
        self.length = 0
        """Positions stored, the same for all; advanced once per forward, after the last layer."""
        self._room = room
        self._last_ids_B: Tensor | None = None
        self._own: list[KeysValues] = []
        for source in sources:
            _, heads, _, width = source.k_BQSH.shape
            shape = (num_targets, heads, room, width)
            self._own.append(
                KeysValues(source.k_BQSH.new_empty(shape), source.v_BQSH.new_empty(shape))
            )

    @property
    def num_sources(self) -> int:
        """C."""
        return len(self.sources[0].k_BQSH)

    def append(self, layer: int, new: KeysValues) -> KeysValues:
        """Store the next positions of a layer, and return all."""
        end = self.length + new.k_BQSH.shape[2]
        if end > self._room:
            raise IndexError(f"{end} positions in a cache for {self._room}")
        own = self._own[layer]
        for kept, more in zip(own, new, strict=True):
            kept[:, :, self.length : end] = more
        return KeysValues(*(kept[:, :, :end] for kept in own))

    def advance(self, ids_BL: Tensor) -> None:
        """Note that all layers have stored the rows of these ids."""
        self.length += ids_BL.shape[1]
        self._last_ids_B = ids_BL[:, -1]

    def with_previous_ids(self, batch: Batch) -> Batch:
        """Return the batch with the id before each target's first new row, if it has ids."""
        if batch.previous_ids_T is None or self._last_ids_B is None:
            return batch
        previous_BL = batch.previous_ids_T.clone().unflatten(0, (self.num_targets, -1))
        previous_BL[:, 0] = self._last_ids_B
        return replace(batch, previous_ids_T=previous_BL.flatten())

    def keep(self, targets_B: Tensor) -> None:
        """Go on with some targets, int64 ``[B]``: beams that share a beginning copy it.

        Each must be of the same source as the one in whose place it comes.
        """
        for own in self._own:
            for kept in own:
                used = kept[:, :, : self.length]
                used.copy_(used.index_select(0, targets_B))
        if self._last_ids_B is not None:
            self._last_ids_B = self._last_ids_B.index_select(0, targets_B)
