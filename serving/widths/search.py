"""How many experts may be narrow: bisection over experts in the order of their importance.

After EdgeMoE, which narrows the least important experts until the loss reaches what is tolerated.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

Key = tuple[int, int]
"""(layer, expert)."""


@dataclass(frozen=True, slots=True)
class Step:
    """One measurement of the search."""

    num_narrow: int
    perplexity: float
    is_within: bool
    """Whether that is at most the limit."""


def most_narrow(
    order: Sequence[Key],
    perplexity_of: Callable[[Collection[Key]], float],
    limit: float,
    report: Callable[[Step], None],
) -> Step | None:
    """Return the measured step with the most narrow experts whose perplexity is within ``limit``.

    ``order`` has the experts, the least important first, and a step narrows the first of them.
    Perplexity grows with every expert, but for noise; the search takes that for granted, so a
    larger number within the limit may exist. ``report`` hears of each step. None if not even all
    wide experts are within the limit.
    """

    def measure(num_narrow: int) -> Step:
        perplexity = perplexity_of(order[:num_narrow])
        step = Step(num_narrow, perplexity, perplexity <= limit)
        report(step)
        return step

    best = measure(0)
    if not best.is_within:
        return None
    every = measure(len(order))
    if every.is_within:
        return every
    too_many = len(order)
    while too_many - best.num_narrow > 1:
        step = measure((best.num_narrow + too_many) // 2)
        if step.is_within:
            best = step
        else:
            too_many = step.num_narrow
    return best
