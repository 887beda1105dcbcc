"""An encoder-decoder that recommends items.

B users.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...errors import ConfigError
from ..items.shape import SessionShape
from ..items.table import ItemTable
from .describe import describe
from .encoder_decoder import EncoderDecoder
from .sessions import generate_sessions, histories


class Recommended(NamedTuple):
    """What a user may want next."""

    items: tuple[str, ...]
    """The items of the likeliest session in its order, then those that other sessions add."""
    log_prob: float
    """Of the likeliest session."""


class Recommender:
    """An encoder-decoder that :func:`moeyard.load_recommender` opened. Call it with histories.

    ``items`` is the table of items, ``shape`` says what the model was trained on, ``model`` is the
    torch module.
    """

    def __init__(self, model: EncoderDecoder, items: ItemTable, shape: SessionShape) -> None:
        if model.config.vocabulary != items.vocabulary:
            raise ConfigError(
                f"the model has {model.config.vocabulary} tokens, but its table of items has "
                f"{items.vocabulary}; export the run again."
            )
        self.model = model.eval()
        self.config = model.config
        self.items = items
        self.shape = shape

    def __repr__(self) -> str:
        """Show layers, widths, experts, parameters, items, type, device and the share on disk."""
        items = f"\n  items: {len(self.items)}, {self.items.num_levels} codes each"
        return f"Recommender({describe(self.model)}{items}\n)"

    def __call__(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 5,
        beams: int = 8,
        batch_users: int = 32,
    ) -> list[Recommended]:
        """Return ``k`` items for each history, which has the oldest item first.

        The model generates sessions of ``shape.session_items`` items by a beam search with
        ``beams`` sessions. It reads the newest items of long histories. Fewer items than ``k`` come
        back where the sessions have fewer different ones. Raises :class:`ConfigError` for unknown
        items, empty histories, and more items than the beams have.
        """
        for name, value in (("k", k), ("beams", beams), ("batch_users", batch_users)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; use a number from 1 upwards.")
        if k > beams * self.shape.session_items:
            raise ConfigError(
                f"k is {k}, but {beams} beams with {self.shape.session_items} items each have "
                "fewer; raise beams."
            )
        known = [self._places(history, user) for user, history in enumerate(histories)]
        return [
            found
            for start in range(0, len(known), batch_users)
            for found in self._recommend(known[start : start + batch_users], k, beams)
        ]

    def _places(self, history: Sequence[str], user: int) -> list[int]:
        """Return the places of the items of a history that are read."""
        if isinstance(history, str) or not history:
            raise ConfigError(f"history {user} is {history!r}; give a list of one item or more.")
        unknown = [item for item in history if item not in self.items.number]
        if unknown:
            raise ConfigError(
                f"history {user} has the item {unknown[0]!r}, which the model does not know; take "
                "it out, or train with it."
            )
        return [self.items.number[item] for item in history[-self.shape.history_items :]]

    @torch.inference_mode()
    def _recommend(self, known: list[list[int]], k: int, beams: int) -> list[Recommended]:
        flat_N = torch.tensor([item for own in known for item in own])
        lengths = tuple(len(own) * self.items.num_levels for own in known)
        source = histories(self.items.tokens(flat_N).flatten(), lengths).to(self.model.device)
        found = generate_sessions(self.model, self.items, source, self.shape.session_items, beams)
        return [
            Recommended(
                tuple(self.items.names[item] for item in found.best_items(user, k)),
                float(found.log_probs_BW[user, 0]),
            )
            for user in range(len(known))
        ]
