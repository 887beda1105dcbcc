"""Frozen experts whose matrices are in memory, or come from elsewhere when they are needed."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

from .activation import Activation
from .expert_weights import ExpertWeights, SlotTable
from .quantized_weights import SlotWeights

Waves = Generator[tuple[list[int], SlotWeights]]
Stream = Callable[[Mapping[int, int]], Waves]
"""Brings the experts that have rows, given as expert and number of rows. Each wave names some of
them, and its weights are valid until the next. Order and split of the waves do not matter."""


@dataclass(frozen=True, slots=True)
class FrozenExperts:
    """The frozen matrices of a layer's experts."""

    stream: Stream
    """Called once by forward and once by backward, if there are rows."""
    num_experts: int
    """E: how many experts the routing may name."""
    d_expert: int
    """F."""
    activation: Activation
    slots: SlotTable | None = None
    """Which slot of the low-rank updates an expert has; None = slot e is expert e's."""

    @classmethod
    def in_memory(cls, weights: ExpertWeights) -> "FrozenExperts":
        """Return the experts of ``weights``, which come in one wave."""

        def stream(rows_of: Mapping[int, int]) -> Waves:
            yield list(rows_of), weights

        d_expert = weights.fc2_SDF.shape[2]
        return cls(stream, weights.num_experts, d_expert, weights.activation, weights)

    def slot(self, expert: int) -> int:
        """Return an expert's slot of the low-rank updates."""
        return expert if self.slots is None else self.slots.slot(expert)
