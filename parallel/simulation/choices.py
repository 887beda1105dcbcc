"""Which experts tokens choose: loads under skew, and how many ranks a token visits.

The K experts of a token are drawn as unevenly as their loads say, and otherwise as freely as can
be: the probability of a set of K is proportional to the product of its experts' odds ``w_e``. No
other distribution with these loads has more entropy (conditional Poisson sampling; Chen, Dempster
and Liu, Biometrika 1994). With equal odds any K experts are equally likely, as in
:func:`~moeyard.parallel.planning.even_work.even_work`.

E experts, K choices, R ranks. ``e_k`` are the elementary symmetric polynomials of the odds.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import ConfigError

Array = npt.NDArray[np.float64]
ROUNDS = 100
CLOSE = 1e-6
DRAWS = 8
LEAST = 1e-9
"""Share of an expert without any rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """How the tokens of one MoE layer choose."""

    odds_E: Array
    k: int

    @classmethod
    def even(cls, num_experts: int, k: int) -> "Choices":
        """Return tokens that choose any K experts equally likely."""
        return cls(np.ones(num_experts), k)

    @classmethod
    def of_loads(cls, load_E: Sequence[float] | Array, k: int) -> "Choices":
        """Return tokens whose experts get these loads, by their shares.

        A token visits an expert once, so no expert gets more than one row of a token: larger shares
        are cut. Odds are found by iteration: ``w_e`` times the wanted over the found probability.
        """
        loads = np.asarray(load_E, dtype=np.float64)
        if loads.sum() <= 0 or k >= len(loads):
            return cls.even(len(loads), k)
        shares_E = loads / loads.sum() + LEAST  # no K experts have all of the load
        wanted_E = _at_most_one(shares_E * k, k)
        odds_E = wanted_E / (1 - np.minimum(wanted_E, 0.999))
        for _ in range(ROUNDS):
            odds_E = odds_E / odds_E.max()
            found_E = cls(odds_E, k).visits_E()
            ratio_E = np.divide(wanted_E, found_E, out=np.ones_like(found_E), where=found_E > 0)
            if np.abs(ratio_E - 1).max() < CLOSE:
                break
            odds_E = odds_E * ratio_E
        return cls(odds_E, k)

    def visits_E(self) -> Array:
        """Return the probability that a token visits an expert; they add up to K."""
        odds_E, k, count = self.odds_E, self.k, len(self.odds_E)
        before = np.zeros((count + 1, k + 1))
        after = np.zeros((count + 1, k + 1))
        before[0, 0] = after[count, 0] = 1
        for e in range(count):
            before[e + 1] = before[e]
            before[e + 1, 1:] += odds_E[e] * before[e, :-1]
            back = count - 1 - e
            after[back] = after[back + 1]
            after[back, 1:] += odds_E[back] * after[back + 1, :-1]
        # e_{K-1} without expert e: what comes before it times what comes after.
        without_E = (before[:-1, :k] * after[1:, k - 1 :: -1]).sum(axis=1)
        found: Array = odds_E * without_E / before[count, k]
        return found

    def visits_R(self, shares_RE: Array) -> Array:
        """Return the probability that a token visits a rank at least once.

        ``shares_RE[r, e]`` is the share of an expert's rows that rank r computes: 1 for the owner
        of an expert without copies. ``1 - e_K(w (1 - share)) / e_K(w)``: no choice goes there.
        """
        left_RE = self.odds_E * (1 - shares_RE)
        return 1 - _polynomial(left_RE, self.k) / _polynomial(self.odds_E[None], self.k)


def _polynomial(odds_RE: Array, k: int) -> Array:
    """Return ``e_K`` of each line."""
    sums = np.zeros((len(odds_RE), k + 1))
    sums[:, 0] = 1
    for odds_R in odds_RE.T:
        sums[:, 1:] = sums[:, 1:] + odds_R[:, None] * sums[:, :-1]
    found: Array = sums[:, k]
    return found


def _at_most_one(wanted_E: Array, k: int) -> Array:
    """Cut probabilities above 1 and share what is cut among the others, in proportion."""
    for _ in range(len(wanted_E)):
        is_full = wanted_E >= 1
        rest = k - is_full.sum()
        others = wanted_E[~is_full].sum()
        if others <= 0 or abs(others - rest) < CLOSE:
            break
        wanted_E = np.where(is_full, 1.0, wanted_E * rest / others)
    return np.minimum(wanted_E, 1.0)


def skewed(text: str, num_experts: int, k: int, layers: int) -> list[Choices]:
    """Return choices for ``--skew``: ``none`` or ``zipf:S``, for as many layers.

    The r-th most popular expert has odds ``r ** -S``. Which experts are the popular ones differs
    between layers, as chance has it, and is the same in each call. After :data:`DRAWS` layers they
    come again, and layers that are equal are simulated once.
    """
    if text == "none":
        return [Choices.even(num_experts, k)] * layers
    found = re.fullmatch(r"zipf:(\d+(?:\.\d+)?)", text)
    if found is None or float(found[1]) > 10:
        raise ConfigError(f"--skew is {text!r}; write zipf:1.0 with an exponent up to 10, or none.")
    odds_E = np.arange(1, num_experts + 1, dtype=np.float64) ** -float(found[1])
    generator = np.random.default_rng(0)
    draws = [Choices(generator.permutation(odds_E), k) for _ in range(min(layers, DRAWS))]
    return [draws[layer % DRAWS] for layer in range(layers)]
