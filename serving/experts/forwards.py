"""What the store is told of each forward before it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...moe.batch import Batch
from ...moe.models.model import Model
from ...moe.routes.rows import Phase
from ...moe.routes.sequence_numbers import SequenceNumbers


@dataclass(frozen=True, slots=True)
class Forward:
    """A forward that begins. Its sequences have the same order in all fields."""

    sequences: tuple[int, ...]
    """Numbers that stay with the sequences from forward to forward."""
    phases: tuple[Phase, ...]
    """What each sequence's rows are: of a prompt, or generated."""
    lengths: tuple[int, ...]
    """Rows of each sequence: with drafts, a text that generates may have several."""


def announce_forwards(decoder: Model, begin: Callable[[Forward], None]) -> RemovableHandle:
    """Call ``begin`` before every forward of ``decoder``."""
    numbers = SequenceNumbers()

    def hook(batch: Batch) -> None:
        sequences, phases = numbers.of(batch)
        begin(_forward(sequences, phases, batch.lengths))

    return decoder.before_forwards(hook)


def announce_inputs(decoder: Model, start: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``start`` with the rows that enter the first layer, ``[N, D]``, of every forward."""

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        start(arguments[0])

    return decoder.layers[0].register_forward_pre_hook(hook)


def _forward(sequences: list[int], phases: list[Phase], lengths: tuple[int, ...]) -> Forward:
    """Join the positions of a text, which follow each other, to one sequence."""
    if len(set(sequences)) == len(sequences):
        return Forward(tuple(sequences), tuple(phases), lengths)
    rows_of: dict[int, int] = {}
    for sequence, rows in zip(sequences, lengths, strict=True):
        rows_of[sequence] = rows_of.get(sequence, 0) + rows
    phase_of = dict(zip(sequences, phases, strict=True))
    return Forward(tuple(rows_of), tuple(phase_of[s] for s in rows_of), tuple(rows_of.values()))
