"""From recorded routes to what each forward asks of a store.

N rows, L MoE layers, E experts of a layer, K choices.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import DataError
from ...moe.routes.reader import RouteFile
from ...moe.routes.rows import Array, Phase, Routes, joined
from .forwards import Forward
from .policies.policy import Key


@dataclass(frozen=True, slots=True)
class RecordedForward:
    """A forward, and the experts that its layers needed."""

    forward: Forward
    rows_of_L: tuple[dict[int, int], ...]
    """For each MoE layer: expert -> rows of the forward that chose it, in rising order."""
    experts_NLK: Array
    """As recorded; -1 = none."""

    @property
    def num_rows(self) -> int:
        """Rows of all sequences."""
        return sum(self.forward.lengths)

    def keys(self, moe_layers: Sequence[int]) -> Iterator[list[Key]]:
        """Yield the experts that each layer needs."""
        for layer, rows_of in zip(moe_layers, self.rows_of_L, strict=True):
            yield [(layer, expert) for expert in rows_of]


def read_forwards(files: Sequence[RouteFile]) -> list[RecordedForward]:
    """Return all forwards; several files follow each other, as if one process had run them.

    Raises :class:`DataError` for routes of training and for files without rows. After it, a file
    that was cut short has its ``damage``.
    """
    found: list[RecordedForward] = []
    for file in files:
        first = 1 + max((s for f in found for s in f.forward.sequences), default=-1)
        found += forwards_of(file.chunks(), file.header.num_experts, first)
    if not found:
        names = ", ".join(str(file.path) for file in files)
        raise DataError(f"{names} has no rows; record some.")
    return found


def forwards_of(
    chunks: Iterable[Routes], num_experts: int, first_sequence: int = 0
) -> Iterator[RecordedForward]:
    """Yield the forwards of chunks in the order of recording; a forward is the rows of one step.

    ``first_sequence`` is added to the sequences' numbers. Raises :class:`DataError` for routes of
    training.
    """
    rest: Routes | None = None
    for chunk in chunks:
        if (chunk.phases_N == Phase.TRAIN).any():
            raise DataError(
                "the routes are those of training, where all experts are in memory; give routes of "
                "generate or serve."
            )
        rows = chunk if rest is None else joined([rest, chunk])
        starts = np.flatnonzero(np.diff(rows.steps_N, prepend=rows.steps_N[0] - 1))
        ends = [*starts[1:], len(rows)]
        for start, end in zip(starts[:-1], ends[:-1], strict=True):
            yield _forward(rows.select(slice(start, end)), num_experts, first_sequence)
        rest = rows.select(slice(starts[-1], len(rows)))  # it may go on in the next chunk
    if rest is not None:
        yield _forward(rest, num_experts, first_sequence)


def _forward(rows: Routes, num_experts: int, first_sequence: int) -> RecordedForward:
    sequences_N = rows.sequences_N
    starts = np.flatnonzero(np.diff(sequences_N, prepend=sequences_N[0] - 1))
    forward = Forward(
        sequences=tuple((sequences_N[starts] + first_sequence).tolist()),
        phases=tuple(Phase(phase) for phase in rows.phases_N[starts].tolist()),
        lengths=tuple(np.diff(starts, append=len(rows)).tolist()),
    )
    rows_of_L = []
    for place in range(rows.experts_NLK.shape[1]):
        chosen = rows.experts_NLK[:, place].ravel()
        counts_E = np.bincount(chosen[chosen >= 0], minlength=num_experts)
        needed = np.flatnonzero(counts_E)
        rows_of_L.append(dict(zip(needed.tolist(), counts_E[needed].tolist(), strict=True)))
    return RecordedForward(forward, tuple(rows_of_L), rows.experts_NLK)
