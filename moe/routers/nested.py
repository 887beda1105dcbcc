"""The values of a router inside another one, under names of their own.

T tokens, E experts, K choices.
"""

from torch import Tensor

from .loss_terms import GlobalCounts
from .routing import Routing

INNER = "inner."
"""Prefix of the inner router's values in ``Routing.extras`` and ``extra_counts``."""


def keep_inner(routing: Routing, inner: Routing) -> None:
    """Store in ``routing`` what the inner router's losses and steps need."""
    choices = {"experts_TK": inner.experts_TK, "weights_TK": inner.weights_TK}
    counts = {"counts_E": inner.counts_E}
    routing.extras |= _prefixed(inner.extras | choices)
    routing.extra_counts |= _prefixed(inner.extra_counts | counts)


def inner_routing(routing: Routing) -> Routing:
    """Return what the inner router had returned; in evaluation, with the outer one's choices."""
    extras, extra_counts = _inner_of(routing.extras), _inner_of(routing.extra_counts)
    return Routing(
        experts_TK=extras.pop("experts_TK", routing.experts_TK),
        weights_TK=extras.pop("weights_TK", routing.weights_TK),
        counts_E=extra_counts.pop("counts_E", routing.counts_E),
        num_tokens=routing.num_tokens,
        extras=extras,
        extra_counts=extra_counts,
    )


def inner_counts(counts: GlobalCounts) -> GlobalCounts:
    """Return the counts of the inner router; those of a router without one as they are."""
    if f"{INNER}counts_E" not in counts.extra:
        return counts
    extra = _inner_of(counts.extra)
    return GlobalCounts(extra.pop("counts_E"), counts.num_tokens, extra)


def _prefixed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{INNER}{name}": value for name, value in values.items()}


def _inner_of(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(INNER): v for n, v in values.items() if n.startswith(INNER)}
