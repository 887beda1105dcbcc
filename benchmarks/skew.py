"""Loads for benchmarks: which experts tokens choose at a step, by the kind of skew.

Every kind is a popularity, which :func:`experts_of` turns into choices. T tokens, K choices of a
token, E experts. Which experts are the popular ones depends on the seed: they are spread over the
ranks as chance has it.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from moeyard.errors import ConfigError

HOT = 0.5
"""Probability that a token's first choice is hot, in the kinds that have hot experts."""
ROTATES_EVERY = 10
BURST_EVERY, BURST_STEPS = 20, 2

Popularity = Callable[[int, int], np.ndarray]
"""Returns for a step and the number of experts their popularity [E], which adds up to 1."""


def uniform(_: int, experts: int) -> np.ndarray:
    """Return equal popularity: what a perfect balance loss leaves to chance."""
    return np.full(experts, 1 / experts)


def zipf(_: int, experts: int) -> np.ndarray:
    """Return Zipf's law with exponent 1.0: the r-th most popular expert has a share of 1 / r."""
    weights_E = 1 / np.arange(1, experts + 1)
    return weights_E / weights_E.sum()


def one_hot(_: int, experts: int) -> np.ndarray:
    """Return one hot expert, always the same; the others are equal."""
    return _hot_set(np.array([0]), experts)


def rotating(step: int, experts: int) -> np.ndarray:
    """Return a hot set of an eighth of the experts; the next eighth follows every 10 steps."""
    size = max(1, experts // 8)
    first = step // ROTATES_EVERY * size
    return _hot_set(np.arange(first, first + size) % experts, experts)


def burst(step: int, experts: int) -> np.ndarray:
    """Return equal popularity, but in the last 2 of 20 steps one hot expert, each time the next."""
    if step % BURST_EVERY < BURST_EVERY - BURST_STEPS:
        return uniform(step, experts)
    return _hot_set(np.array([step // BURST_EVERY % experts]), experts)


KINDS: dict[str, Popularity] = {
    "uniform": uniform,
    "zipf": zipf,
    "one_hot": one_hot,
    "rotating": rotating,
    "burst": burst,
}


def experts_of(kind: str, step: int, tokens: int, experts: int, k: int, seed: int = 0) -> Tensor:
    """Return experts_TK, int32: ``k`` different experts for each of ``tokens`` tokens.

    A token draws its experts one after another by the popularity of those that are left (the
    Gumbel-top-k trick: Kool et al., 2019, https://arxiv.org/abs/1903.06059). The same arguments
    give the same choices. Ranks ask for the whole batch and take their rows.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}; take one of {', '.join(KINDS)}.")
    if not 1 <= k <= experts or experts < 2:
        raise ConfigError(f"k is {k} and experts {experts}; take 1 <= k <= experts, and 2 or more.")
    order_E = np.random.default_rng(seed).permutation(experts)
    popularity_E = np.empty(experts)
    popularity_E[order_E] = KINDS[kind](step, experts)
    gumbel_TE = np.random.default_rng([seed, step]).gumbel(size=(tokens, experts))
    scores_TE = np.log(popularity_E) + gumbel_TE
    experts_TK = np.argsort(-scores_TE, axis=1)[:, :k]
    return torch.from_numpy(experts_TK.astype(np.int32))


def _hot_set(hot: np.ndarray, experts: int) -> np.ndarray:
    """Return ``HOT`` spread over the hot experts and the rest over the others."""
    popularity_E = np.full(experts, (1 - HOT) / (experts - len(hot)))
    popularity_E[hot] = HOT / len(hot)
    return popularity_E
