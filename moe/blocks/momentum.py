"""MomentumSMoE (Teo and Nguyen 2024): heavy-ball momentum from MoE layer to MoE layer.

T tokens, D model width.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from .block import BlockConfig, Place, State, wide
from .residual import Residual


class Momentum(BlockConfig):
    """``m = mu m + gamma y`` and ``x + m``: heavy-ball momentum over the MoE layers (MomentumSMoE).

    The paper subtracts: its experts' output is a gradient. Here it is added, as in every other
    block. Experts trained from scratch learn either sign. A model that was trained as a plain one
    keeps the meaning of its experts, but it is another function with momentum. With an output that
    stays the same from layer to layer, m grows to ``gamma / (1 - mu)`` times that output.
    """

    paper: ClassVar[str] = "Teo and Nguyen 2024 (MomentumSMoE)"

    kind: Literal["momentum"] = "momentum"
    mu: float = Field(default=0.7, ge=0, lt=1)
    """Part of the momentum that the next MoE layer keeps; 0 is the plain residual, if gamma is
    1."""
    gamma: float = Field(default=1.0, gt=0)
    """Factor on the experts' output."""

    def join(self, x_TD: Tensor, y_TD: Tensor, state: State, place: Place) -> tuple[Tensor, State]:
        """Add the momentum, which is the state."""
        m_TD = pushed(state, y_TD, self.mu, self.gamma)
        return (x_TD + m_TD).to(x_TD.dtype), (m_TD,)

    def num_carried(self, place: Place) -> int:
        """Return 1 behind the first MoE layer."""
        return int(place.index > 0)

    def architecture(self) -> dict[str, Any]:
        """Return all fields, or those of the plain residual if it is the same."""
        if self.mu == 0 and self.gamma == 1:
            return Residual().architecture()
        return super().architecture()


def pushed(state: State, y_TD: Tensor, mu: float, gamma: float) -> Tensor:
    """Return ``mu m + gamma y`` with the momentum m that is first in ``state``, or without one."""
    step_TD = gamma * wide(y_TD)
    return mu * state[0] + step_TD if state else step_TD
