"""The kinds of optimizer that ``optimizer.kind`` names."""

from torch import Tensor, nn

from .adamw import AdamW, AdamWConfig
from .optimizer import MasterOptimizer


def open_optimizer(
    config: AdamWConfig, model: nn.Module, masters: dict[str, Tensor]
) -> MasterOptimizer:
    """Return the optimizer of a run; ``masters`` are fp32 copies of narrower parameters."""
    rule = AdamW(config)
    return MasterOptimizer(model, masters, rule, rule)
