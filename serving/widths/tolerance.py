"""From a tolerated perplexity to the experts that get few bits."""

import sys
from collections.abc import Collection

from torch import Tensor

from ...errors import ConfigError
from ...moe.models.language_model import LanguageModel
from ..evaluation.held_out_text import ROWS, score_text
from .importance import measure_importance
from .search import Key, Step, most_narrow
from .weights import NARROW, WIDE, NarrowSome, round_experts


class WidthSearch:
    """A model whose experts are narrowed in memory, and what that does to a text.

    Opening it scores the text with the exact model, measures importance, and puts experts of two
    widths in the place of the model's.
    """

    def __init__(self, model: LanguageModel, text: str, ids_T: Tensor) -> None:
        """``ids_T`` are the tokens of ``text``."""
        self._model, self._text = model, text
        self._length = min(model.config.max_positions, ROWS, ids_T.numel() - 1)
        self.exact = self._score()
        """Perplexity of the exact model."""
        widths = round_experts(model.decoder)
        importance = measure_importance(model.decoder, widths, ids_T, self._length)
        self.order: list[Key] = sorted(importance, key=lambda key: (importance[key], key))
        """All experts, the least important first."""
        self._experts = NarrowSome(model.decoder, widths)
        self._known: dict[int, float] = {}
        """Perplexities by the number of narrow experts."""

    def within(self, tolerance: float) -> Step:
        """Return how many experts may be narrow, so that perplexity is within ``1 + tolerance``.

        Raises :class:`ConfigError` for a tolerance that not even wide experts meet.
        """
        limit = self.exact * (1 + tolerance)

        def report(step: Step) -> None:
            sys.stderr.write(
                f"event=searching_widths int{NARROW}={step.num_narrow} of={len(self.order)} "
                f"perplexity={step.perplexity:.5f} limit={limit:.5f}\n"
            )

        found = most_narrow(self.order, self._perplexity_of, limit, report)
        if found is None:
            loss = self._known[0] / self.exact - 1
            raise ConfigError(
                f"tolerance is {tolerance}, but with all experts in int{WIDE} perplexity is "
                f"{loss:.3%} higher already; use a larger one, or bf16."
            )
        return found

    def score(self, narrow: Collection[Key]) -> float:
        """Narrow these experts alone, and return the perplexity."""
        self._experts.narrow(narrow)
        return self._score()

    def _perplexity_of(self, keys: Collection[Key]) -> float:
        if len(keys) not in self._known:
            self._known[len(keys)] = self.score(keys)
        return self._known[len(keys)]

    def _score(self) -> float:
        return score_text(self._model, self._text, self._length).perplexity
