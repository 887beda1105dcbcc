"""What a run whose experts exchange weights cannot have (moe/exchange.py)."""

from typing import Any, Protocol

from ..moe.config.model import LayersConfig
from ..moe.routers.averaged import AveragedConfig


class Run(Protocol):
    """A run's configuration, as far as averages are concerned."""

    @property
    def train(self) -> Any:
        """The loop."""

    @property
    def model(self) -> Any:
        """The model."""

    @property
    def parallel(self) -> Any:
        """How ranks share the work."""

    @property
    def optimizer(self) -> Any:
        """The optimizer."""


def problem_with_averages(run: Run) -> str | None:
    """Return why experts of a run cannot be averaged as it says, or None."""
    model: LayersConfig = run.model
    routers = [model.router(layer) for layer in model.moe_layers]
    averaged = [router.kind for router in routers if isinstance(router, AveragedConfig)]
    if not averaged:
        return None
    given = {
        "parallel.expert_tp": run.parallel.expert_tp > 1,
        "parallel.copies": run.parallel.copies is not None,
        "optimizer.shard_experts": run.optimizer.shard_experts,
        "train.sparse_experts": run.train.sparse_experts is not None,
    }
    for name, is_given in given.items():
        if is_given:
            return (
                f"{name} is given, but experts of {averaged[0]} routers exchange whole weights "
                "after each step; leave it out, or use another router."
            )
    return None
