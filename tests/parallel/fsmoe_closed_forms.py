"""FSMoE's closed forms of a layer's time, and the exact ones, as oracles of the simulation.

a = all-to-all, g = gather, e = experts, s = scatter of one chunk; gar = the gradients' all-reduce.
"""

from typing import NamedTuple


class Setting(NamedTuple):
    """One layer of r equal chunks."""

    r: int
    a: float
    g: float
    e: float
    s: float
    gar: float = 0.0


def case_of(x: Setting) -> int:
    """Return the paper's case from its seven predicates (section 4.3)."""
    r, a, g, e, s, gar = x
    q1 = a > g
    q2 = r * e > 2 * (r - 1) * a
    q3 = r * e > (r - 1) * (g + s)
    q4 = gar > g + s
    q5 = gar > r * e - 2 * (r - 1) * a + g + s
    q6 = gar > r * g + r * s - 2 * (r - 1) * a
    q7 = gar > g + s + r * e - 2 * (r - 1) * a
    cases = {
        1: (q1 and not q2 and q4)
        or (q1 and q2 and q5)
        or (not q1 and not q3 and q6)
        or (not q1 and q3 and q7),
        2: (q1 and q2 and not q5) or (not q1 and q3 and not q7),
        3: q1 and not q2 and not q4,
        4: not q1 and not q3 and not q6,
    }
    (case,) = [number for number, holds in cases.items() if holds]
    return case


def forms(x: Setting) -> dict[int, float]:
    """Return the paper's four times."""
    r, a, g, e, s, gar = x
    return {
        1: 2 * r * a + gar,
        2: 2 * a + g + s + r * e,
        3: 2 * r * a + g + s,
        4: 2 * a + r * (g + s),
    }


def paper(x: Setting) -> float:
    """Return the time of the paper's case."""
    return forms(x)[case_of(x)]


def exact(x: Setting) -> float:
    """Return the longest of all paths through the schedule.

    A path runs along one link, changes to the next resource at some chunk, and so on. Its length
    is linear in the chunks at which it changes. So only the first and last chunk need to be tried:
    the four forms of the paper, and six more.
    """
    r, a, g, e, s, _ = x
    more = (
        a + g + e + s + r * a,  # changes at the first chunk everywhere: C must wait for C
        r * a + g + e + s + a,  # and at the last
        a + r * g + e + s + a,  # the gathers are the longest
        a + g + e + r * s + a,  # the scatters are
        r * a + g + r * s + a,  # slow dispatches and scatters, fast gathers
        a + r * g + s + r * a,  # slow gathers and combines, fast scatters
    )
    return max(*forms(x).values(), *more)
