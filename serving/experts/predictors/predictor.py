"""What a predictor is told, and what it says: which experts will the next layers need?

N rows, D model width, K choices.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from ....moe.routes.rows import Array
from ..forwards import Forward
from ..policies.policy import Key

DISTANCE = 3
"""Layers ahead that predictors look at. The gates of a model of 8 layers had a recall of 0.70, 0.59
and 0.50 one, two and three layers ahead, at width K."""


class Hint(NamedTuple):
    """An expert that a forward will perhaps need."""

    key: Key
    score: float
    """The estimated chance that it will, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class PredictorFacts:
    """What a predictor is built from."""

    moe_layers: tuple[int, ...]
    """Indices of the decoder layers with experts, in the order of a forward."""
    num_experts: int
    """Experts of a layer."""
    k: int
    """Experts that a row visits in a layer."""
    architecture: str
    """Of the model, as in the header of a route file."""
    known: int = 0
    """Next layers whose choice is known already when a layer's experts run: 1 with pre-gating."""

    def following(self, layer: int) -> tuple[int, ...]:
        """Return the next :data:`DISTANCE` MoE layers that have not chosen, the nearest first."""
        first = self.moe_layers.index(layer) + 1 + self.known
        return self.moe_layers[first : first + DISTANCE]

    @property
    def foretelling(self) -> tuple[int, ...]:
        """The MoE layers that others follow which have not chosen."""
        return self.moe_layers[: max(0, len(self.moe_layers) - 1 - self.known)]


class Predictor(Protocol):
    """Says which experts layers will need before their routers choose.

    The store checks every hint against the true choice later. So a predictor can only make an
    answer slower, never wrong. An object serves one store. All calls come from one thread, in the
    order of the layers. Rows are those of the forward's sequences, one after the other.
    """

    def begin(self, forward: Forward) -> list[Hint]:
        """A forward begins; return hints for its first layers."""
        ...

    def see(self, layer: int, experts_NK: Array) -> None:
        """``layer`` has chosen ``[N, K]`` experts, -1 = none. Called for every layer.

        Predictors learn here, also while reading ahead is switched off.
        """
        ...

    def after_choice(self, layer: int, x_ND: Tensor | None) -> list[Hint]:
        """Return hints for layers after ``layer``, whose choice :meth:`see` has just brought.

        ``x_ND`` are the rows that its experts read; None in a replay of recorded routes. After the
        last layer, the hints are for the next forward of the same sequences.
        """
        ...
