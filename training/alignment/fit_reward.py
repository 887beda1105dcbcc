"""Fit a reward model to the sessions of a log.

B sessions, I items of a session, O outcomes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ...moe.items.table import ItemTable
from ..data.session_rows import LoggedSessions
from ..data.session_rows import Numbers as Places
from .reward import OUTCOMES, RewardModel, new_reward_model, outcome_loss

MOST_EPOCHS = 20
PATIENCE = 2
"""Epochs without a lower loss on the sessions that judge, before fitting ends: a model with an
embedding for each item soon learns the sessions by heart."""
JUDGES = 10
"""One of so many sessions judges the epochs and is not fitted to."""
BATCH = 128
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1
LATEST = 50
"""Items of a history that are read."""


class Fitted(NamedTuple):
    """A reward model, and how well it knows sessions that it was not fitted to."""

    model: RewardModel
    loss: float
    """Mean binary cross-entropy of the held-out sessions, summed over outcomes."""
    base_loss: float
    """That of the outcomes' means."""


def fit_reward_model(
    sessions: LoggedSessions,
    table: ItemTable,
    positive_watch_s: float,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> Fitted:
    """Fit a model to all sessions before each user's held-out one, the bad ones too.

    The held-out ones and what came after them are not fitted to, and judge the model. The same
    seed gives the same model. ``advance`` is called for each batch. Raises :class:`DataError` where
    there are none of either.
    """
    is_before_C = sessions.is_before_held_out_C
    before, after = np.flatnonzero(is_before_C), np.flatnonzero(~is_before_C)
    if not len(before) or not len(after):
        raise DataError(
            f"the log has {len(before)} sessions before the held-out ones and {len(after)} others, "
            "and a reward model needs both; give a longer log."
        )
    outcomes_CO = outcomes(sessions, positive_watch_s, before)
    model = new_reward_model(table, seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    draw = np.random.Generator(np.random.PCG64(seed))
    order = draw.permutation(before)
    judges, fitted = np.split(order, [max(1, len(order) // JUDGES)])
    best_loss, best, waited = torch.inf, model.state_dict(), 0
    for _ in range(MOST_EPOCHS):
        for start in range(0, len(fitted), BATCH):
            advance()
            loss = _loss(model, sessions, outcomes_CO, fitted[start : start + BATCH])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fitted = draw.permutation(fitted)
        judged = _judge(model, sessions, outcomes_CO, judges)
        waited += 1
        if judged < best_loss:
            best_loss, waited = judged, 0
            best = {name: weight.clone() for name, weight in model.state_dict().items()}
        if waited == PATIENCE:
            break
    model.load_state_dict(best)
    base_O = outcomes_CO[before].mean(dim=0).clamp(1e-4, 1 - 1e-4).logit()
    base_loss = float(outcome_loss(base_O.expand(len(after), -1), outcomes_CO[after]))
    return Fitted(model.eval(), _judge(model, sessions, outcomes_CO, after), base_loss)


def _loss(
    model: RewardModel, sessions: LoggedSessions, outcomes_CO: Tensor, chosen: Places
) -> Tensor:
    return outcome_loss(model(*_inputs(sessions, chosen)), outcomes_CO[chosen])


@torch.no_grad()
def _judge(
    model: RewardModel, sessions: LoggedSessions, outcomes_CO: Tensor, chosen: Places
) -> float:
    """Return the loss of some sessions, a batch at a time."""
    parts = [chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH)]
    losses = [float(_loss(model, sessions, outcomes_CO, part)) * len(part) for part in parts]
    return sum(losses) / len(chosen)


def outcomes(sessions: LoggedSessions, positive_watch_s: float, fitted: Places) -> Tensor:
    """Return the outcomes of all sessions, fp32 ``[C, O]``; the median is that of ``fitted``."""
    watch_s_C = sessions.watch_s_CI.sum(axis=1)
    is_long_C = watch_s_C > np.median(watch_s_C[fitted])
    watched_C = (sessions.watch_s_CI >= positive_watch_s).mean(axis=1)
    found = np.stack([is_long_C, watched_C, sessions.liked_CI.mean(axis=1)], axis=1)
    assert found.shape[1] == len(OUTCOMES)
    return torch.from_numpy(found.astype(np.float32))


def histories_of(sessions: LoggedSessions, chosen: Places) -> tuple[Tensor, tuple[int, ...]]:
    """Return the latest items before some sessions, one history after another, and their counts."""
    ends = sessions.ends_C[chosen]
    starts = np.maximum(sessions.starts_C[chosen], ends - LATEST)
    parts = [sessions.history_P[a:b] for a, b in zip(starts, ends, strict=True)]
    return torch.from_numpy(np.concatenate(parts)), tuple((ends - starts).tolist())


def _inputs(sessions: LoggedSessions, chosen: Places) -> tuple[Tensor, tuple[int, ...], Tensor]:
    return *histories_of(sessions, chosen), torch.from_numpy(sessions.items_CI[chosen])
