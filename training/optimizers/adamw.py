"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .config import OptimizerConfig
from .held import Held


class AdamWConfig(OptimizerConfig):
    """AdamW for all parameters: two numbers of state for each."""

    kind: Literal["adamw"] = "adamw"

    def identity(self) -> dict[str, Any]:
        """Return what decides which state is kept; a resumed run must have the same."""
        return {"kind": self.kind}


class AdamW:
    """See :class:`~moeyard.training.optimizers.rule.UpdateRule`."""

    def __init__(self, config: OptimizerConfig) -> None:
        self._config = config

    def new_state(self, held: Held) -> dict[str, Tensor]:
        """Return two moments."""
        return {kind: torch.zeros_like(held.master) for kind in ("exp_avg", "exp_avg_sq")}

    def steps_seen(self, held: Held, done: int) -> int:
        """Return all of them."""
        return done

    def update(self, parameters: Sequence[Held], lr: float, done: int) -> None:
        """Update with decay what decays, and the rest without."""
        for decays in (True, False):
            some = [held for held in parameters if held.decays == decays]
            self.step(
                [held.master for held in some],
                [held.gradient for held in some],
                some,
                lr,
                self._config.weight_decay if decays else 0.0,
            )

    def step(
        self,
        masters: list[Tensor],
        gradients: list[Tensor],
        held: Sequence[Held],
        lr: float,
        weight_decay: float,
    ) -> None:
        """Update ``masters`` with the state of ``held``, of the same shapes."""
        if not masters:
            return
        adamw(
            masters,
            gradients,
            [h.state["exp_avg"] for h in held],
            [h.state["exp_avg_sq"] for h in held],
            [],
            [h.steps for h in held],
            fused=True,
            amsgrad=False,
            beta1=self._config.betas[0],
            beta2=self._config.betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=self._config.eps,
            maximize=False,
        )
