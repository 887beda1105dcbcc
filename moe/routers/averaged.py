"""Routers whose experts exchange weights in training and are one MLP afterwards."""

from collections.abc import Collection

from pydantic import Field

from .router import RouterConfig
from .row_facts import RowFact


class AveragedConfig(RouterConfig):
    """Base of configurations whose layers have an average expert (moe/experts/average.py).

    Outside training a layer is one MLP with the mean of its experts' weights. So the experts must
    stay near each other: after each step every one takes a part of the mean of the others.
    """

    exchange: float = Field(default=0.3, ge=0, le=1)
    """Weight of the mean of the other experts, which an expert takes after a step; its own weights
    keep the rest. 0 leaves experts apart."""
    exchange_steps: int = Field(default=10_000, ge=0)
    """Steps over which ``exchange`` grows from 0."""

    def exchange_after(self, done: int) -> float:
        """Return the weight of the others' mean after the first ``done`` steps."""
        return self.exchange * min(1.0, done / max(1, self.exchange_steps))

    def why_not_among(self, has: Collection[RowFact]) -> str | None:
        """Return that only models of images have such layers: those whose rows have a task or a
        time."""
        if not {"tasks", "timesteps"}.isdisjoint(has):
            return None
        return (
            f"router.kind is {self.kind}, whose experts share out the rows of an image, and rows "
            "of this model are not of images; choose another router, or give it to an MoELayer in "
            "a model of your own."
        )
