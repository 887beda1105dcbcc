"""The experts that the tokens before visited. N rows, D model width, K choices."""

from torch import Tensor

from ....moe.routes.rows import Array
from ..forwards import Forward
from .chances import best_hints, width_of
from .predictor import Hint, PredictorFacts
from .recency import Recency


class PreviousToken:
    """Expects a sequence's next token to visit the experts that its last tokens visited."""

    def __init__(self, facts: PredictorFacts) -> None:
        self._facts = facts
        self._recency = Recency(facts)
        self._rows = 0

    def begin(self, forward: Forward) -> list[Hint]:
        """Return hints for the first layer."""
        self._recency.begin(forward)
        self._rows = len(forward.sequences)
        return self._hints(self._facts.moe_layers[0], 1)

    def see(self, layer: int, experts_NK: Array) -> None:
        """Count the visits."""
        self._recency.see(layer, experts_NK)

    def after_choice(self, layer: int, x_ND: Tensor | None) -> list[Hint]:
        """Return hints for the next layers."""
        following = self._facts.following(layer) or self._facts.moe_layers[:1]
        hints = []
        for distance, target in enumerate(following, start=1):
            hints += self._hints(target, distance)
        return hints

    def _hints(self, layer: int, distance: int) -> list[Hint]:
        width = width_of(self._facts.k, self._rows, distance)
        return best_hints(layer, self._recency.chances(layer), width)
