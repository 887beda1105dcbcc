"""The values of a router that another router holds. E experts."""

from torch import Tensor

from .loss_terms import GlobalCounts

INNER = "inner."
"""Prefix of the inner router's values in ``Routing.extras`` and ``extra_counts``."""


def inner_counts(counts: GlobalCounts) -> GlobalCounts:
    """Return the counts of the inner router; those of other routers as they are."""
    if f"{INNER}counts_E" not in counts.extra:
        return counts
    counts_E = counts.extra[f"{INNER}counts_E"]
    return GlobalCounts(counts_E, counts.num_tokens, without_prefix(counts.extra))


def without_prefix(extra: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the values of the inner router, by its names and without ``counts_E``."""
    own = {name.removeprefix(INNER): value for name, value in extra.items()}
    own.pop("counts_E", None)
    return own
