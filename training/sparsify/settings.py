"""The options of ``moeyard sparsify``."""

from typing import Literal

from pydantic import Field

from ...errors import ConfigError
from ...moe.routers.contribution import Rule
from ..section import Section

MAX_GRID = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SHARE_GRID = (1.0, 0.995, 0.99, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.3, 0.0)
"""Thresholds of the table, from all experts to the best one, by rule."""


class Settings(Section):
    """How a dense model becomes one with dynamic experts; the defaults suit small models."""

    experts: int = Field(default=32, ge=2)
    """Parts that each MLP is cut into. The papers cut parts of 6 to 128 neurons."""
    activation: Literal["swiglu", "reglu"] = "swiglu"
    """``swiglu`` keeps the model's SiLU. ``reglu`` puts ReLU in its place, whose zeros need no
    computing; it needs ``steps`` of fine-tuning."""
    steps: int = Field(default=0, ge=0)
    """Steps of fine-tuning for sparse activations; 0 = none."""
    lr: float = Field(default=3e-4, gt=0)
    """Learning rate of the fine-tuning."""
    sparsity: float = Field(default=0.3, ge=0)
    """Weight of the sparsity loss, which is about the share of active neurons. The papers' weights
    are of their number: this divided by the MLP's width."""
    router_steps: int = Field(default=1000, ge=1)
    """Steps in which the routers learn the norms of the experts' outputs."""
    router_lr: float = Field(default=2e-3, gt=0)
    """Learning rate of the routers."""
    router_width: int = Field(default=128, ge=1)
    """Hidden width of the routers."""
    rule: Rule = "max"
    """Which experts run; see the router ``contribution``."""
    tau: float | None = Field(default=None, ge=0, le=1)
    """The threshold; None = the one with the fewest operations within ``tolerance``."""
    tolerance: float = Field(default=0.01, ge=0)
    """How much of the held-out loss with all experts a threshold may add to it."""
    length: int = Field(default=256, ge=1)
    """Tokens of a window of text."""
    batch: int = Field(default=8, ge=1)
    """Windows of a step."""
    eval_windows: int = Field(default=64, ge=1)
    """Held-out windows, at most."""
    seed: int = 0
    """Of the windows, the clusters and the routers."""

    def check(self, longest: int) -> None:
        """Raise :class:`ConfigError` for options that do not fit each other or the model."""
        if self.activation == "reglu" and self.steps == 0:
            raise ConfigError(
                "activation is reglu, but steps is 0, so nothing would adapt the model to ReLU; "
                "give steps, such as 1000, or keep swiglu."
            )
        if self.length > longest:
            raise ConfigError(
                f"length is {self.length}, but the model takes at most {longest} tokens; use "
                f"1 to {longest}."
            )

    @property
    def grid(self) -> tuple[float, ...]:
        """The thresholds to measure, from all experts on; the first runs all."""
        grid = MAX_GRID if self.rule == "max" else SHARE_GRID
        if self.tau is None or self.tau in grid:
            return grid
        return tuple(sorted((*grid, self.tau), reverse=self.rule == "share"))
