"""A reward model: what a user would do with a session (OneRec, Deng et al. 2025).

B sessions, I items of a session, L codes, D width, N items of histories, O outcomes.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...errors import DataError
from ...files import replaced
from ...moe.items.table import ItemTable

WIDTH = 32
OUTCOMES = ("watched for long", "watched", "liked")
"""Whether the session's watch time is above the median; the shares of items in a history
afterwards, and of those liked."""


class RewardModel(nn.Module):
    """Predicts the outcomes of a session for the user of a history.

    An item is the sum of its codes' embeddings and its own, times the user elementwise; attention
    between the items of the session; their sum; a tower for each outcome.
    """

    def __init__(self, table: ItemTable) -> None:
        super().__init__()
        self._tokens_NL = table.tokens(torch.arange(len(table)))
        self.embed_codes = nn.Embedding(table.begin, WIDTH)
        self.embed_items = nn.Embedding(len(table), WIDTH)
        self.user = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, num_heads=2, batch_first=True)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)) for _ in OUTCOMES
        )

    def forward(self, history_N: Tensor, lengths: tuple[int, ...], sessions_BI: Tensor) -> Tensor:
        """Return the logits of the outcomes, ``[B, O]``.

        ``history_N`` has the items of all histories, one after another; both have places of items.
        """
        lengths_B = torch.tensor(lengths)
        users_N = torch.arange(len(lengths)).repeat_interleave(lengths_B)
        sums_BD = torch.zeros(len(lengths), WIDTH).index_add(0, users_N, self._items(history_N))
        user_BD = self.user(sums_BD / lengths_B[:, None])
        met_BID = self._items(sessions_BI) * user_BD[:, None]
        met_BID = met_BID + self.attention(met_BID, met_BID, met_BID, need_weights=False)[0]
        session_BD = met_BID.sum(dim=1)
        return torch.cat([tower(session_BD) for tower in self.towers], dim=1)

    @torch.no_grad()
    def reward(self, history_N: Tensor, lengths: tuple[int, ...], sessions_BI: Tensor) -> Tensor:
        """Return the sum of the outcomes' probabilities, fp64 ``[B]``."""
        return self(history_N, lengths, sessions_BI).double().sigmoid().sum(dim=1)

    def _items(self, items: Tensor) -> Tensor:
        codes: Tensor = self.embed_codes(self._tokens_NL[items]).sum(dim=-2)
        own: Tensor = self.embed_items(items)
        return codes + own


def new_reward_model(table: ItemTable, seed: int) -> RewardModel:
    """Return a model with initial weights; the same seed gives the same ones."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = RewardModel(table)
        for embedding in (model.embed_codes, model.embed_items):
            nn.init.normal_(embedding.weight, std=0.5 / math.sqrt(WIDTH))
    return model


def outcome_loss(logits_BO: Tensor, outcomes_BO: Tensor) -> Tensor:
    """Return the binary cross-entropy, summed over outcomes and averaged over sessions."""
    return F.binary_cross_entropy_with_logits(logits_BO, outcomes_BO, reduction="sum") / len(
        logits_BO
    )


def save_reward_model(model: RewardModel, path: Path) -> None:
    """Write a model's weights, whole or not at all."""
    with replaced(path) as unfinished:
        save_file(model.state_dict(), unfinished)


def read_reward_model(path: Path, table: ItemTable) -> RewardModel:
    """Open a model that :func:`save_reward_model` wrote; it must be of the same items."""
    model = RewardModel(table)
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{path} is no reward model of these items ({reason}); remove it, to train another one."
        ) from None
    return model.eval()
