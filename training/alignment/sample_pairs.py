"""Let a model generate sessions, and a reward model pick the best and the worst.

P pairs, W beams, I items of a session, B users.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from ...moe.items.beam import Sessions
from ...moe.models.encoder_decoder import EncoderDecoder
from ...moe.models.sessions import generate_sessions, histories, session_log_probs
from ..data.session_order import SessionOrder
from ..data.session_pairs import SessionPairs
from .fit_reward import histories_of
from .reward import RewardModel

USERS = 16
"""Histories whose beams are computed together."""


class SampledPairs(NamedTuple):
    """Pairs, and what the reward model thinks of the model that generated them."""

    pairs: SessionPairs
    mean_reward: float
    """Of the likeliest session of each sampled row."""


@torch.no_grad()
def sample_pairs(
    model: EncoderDecoder,
    order: SessionOrder,
    reward: RewardModel,
    share: float,
    num_beams: int,
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> SampledPairs:
    """Return a better and a worse session for a share of the training rows, drawn by ``seed``.

    They are the best and the worst of ``num_beams`` by the reward model. A row whose sessions all
    get the same reward has no pair. Log-probabilities are those of ``model``, which becomes the
    reference. ``advance`` is called before some rows' sessions are generated. Raises
    :class:`ConfigError` where no pair is left.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    count = max(1, round(share * len(order)))
    chosen = np.sort(draw.permutation(len(order))[:count])
    found, first_rewards = [], []
    for start in range(0, count, USERS):
        advance()
        some = chosen[start : start + USERS]
        rows = order.rows(some.tolist())
        source = histories(rows.source_N, rows.lengths).to(model.device)
        num_items = rows.targets_BIL.shape[1]
        generated = generate_sessions(model, order.table, source, num_items, num_beams)
        rewards_BW = _rewards(reward, generated, *histories_of(order.sessions, some))
        first_rewards.append(rewards_BW[:, 0])
        has_pair_B, picks_B2 = best_and_worst(rewards_BW, ~generated.log_probs_BW.isinf())
        items_B2I = generated.items_BWI.take_along_dim(picks_B2[:, :, None], dim=1)
        hidden_SD = model.encode(source).hidden_TD
        parts = (
            session_log_probs(
                model, order.table, order.table.tokens(items_BI), hidden_SD, rows.lengths
            )
            for items_BI in items_B2I.unbind(dim=1)
        )
        log_probs_B2 = torch.stack([part.log_probs_B.double().cpu() for part in parts], dim=1)
        pairs = SessionPairs(
            torch.from_numpy(some), items_B2I, log_probs_B2, rewards_BW.gather(1, picks_B2)
        )
        found.append([field[has_pair_B] for field in pairs])
    joined = SessionPairs(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    if not len(joined.sessions_P):
        raise ConfigError(
            f"{count} sampled rows have no two sessions with different rewards; raise --share or "
            f"--beams, which is {num_beams}."
        )
    return SampledPairs(joined, float(torch.cat(first_rewards).mean()))


def best_and_worst(rewards_BW: Tensor, counts_BW: Tensor) -> tuple[Tensor, Tensor]:
    """Return which users have two different rewards, and the beams of the best and the worst.

    Beams without ``counts_BW`` are not chosen. Of equal rewards the likelier session counts.
    """
    best_B = rewards_BW.masked_fill(~counts_BW, -torch.inf).argmax(dim=1)
    worst_B = rewards_BW.masked_fill(~counts_BW, torch.inf).argmin(dim=1)
    picks_B2 = torch.stack([best_B, worst_B], dim=1)
    rewards_B2 = rewards_BW.gather(1, picks_B2)
    return rewards_B2[:, 0] > rewards_B2[:, 1], picks_B2


def _rewards(
    reward: RewardModel, generated: Sessions, history_N: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    """Return the reward of every beam, fp64 ``[B, W]``."""
    num_beams = generated.items_BWI.shape[1]
    parts = history_N.split(lengths)
    repeated_N = torch.cat([part for part in parts for _ in range(num_beams)])
    repeated = tuple(length for length in lengths for _ in range(num_beams))
    rewards_R = reward.reward(repeated_N, repeated, generated.items_BWI.flatten(0, 1))
    return rewards_R.unflatten(0, (len(lengths), num_beams))
