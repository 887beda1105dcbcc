"""Expert load statistics. E experts, L layers."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

MAX_EXPERT_SERIES = 8192
"""With more (layer, expert) pairs than this, metrics are exported per layer only."""


@dataclass(frozen=True, slots=True)
class LoadStatistics:
    """How evenly one layer's routed rows are spread over its experts."""

    max_over_mean: float
    """Largest load over mean load; 1 is perfect balance, E is everything on one expert."""
    max_violation: float
    """MaxVio (Wang et al. 2024): max_over_mean - 1."""
    cv: float
    """Coefficient of variation: standard deviation over mean."""
    idle: int
    """Experts without a single row."""
    entropy: float
    """Entropy of the load in nats; log(E) is perfect balance."""
    dropped: int
    """Routed rows that reached no expert."""

    def as_dict(self) -> dict[str, float | int]:
        """Return plain values for logs."""
        return asdict(self)


def load_statistics(counts_E: Tensor, dropped: int = 0) -> LoadStatistics:
    """Summarise ``counts_E``; ``dropped`` are choices that reached no expert."""
    load_E = counts_E.double()
    total = float(load_E.sum())
    if total == 0:
        return LoadStatistics(0.0, 0.0, 0.0, load_E.numel(), 0.0, dropped)
    mean = total / load_E.numel()
    share_E = load_E / total
    entropy = -float(torch.special.xlogy(share_E, share_E).sum())
    peak = float(load_E.max()) / mean
    return LoadStatistics(
        max_over_mean=peak,
        max_violation=peak - 1,
        cv=float(load_E.std(unbiased=False)) / mean,
        idle=int((load_E == 0).sum()),
        entropy=entropy,
        dropped=dropped,
    )
