"""AdamSMoE (Teo and Nguyen 2024): Adam's step instead of momentum, in the first MoE layers or all.

T tokens, D model width.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from .block import BlockConfig, Place, State, wide
from .momentum import pushed


class Adam(BlockConfig):
    """``(1 - decay) x + rate p / sqrt(v + epsilon)`` with Adam's moments p and v (AdamSMoE).

    ``p = beta1 p + (1 - beta1) y`` and ``v = beta2 v + (1 - beta2) y^2``, both from 0 and without
    bias correction. So the first step is ``(1 - beta1) / sqrt(1 - beta2)`` times ``rate`` in every
    element, with y's sign. As in the authors' code, the first MoE layer makes this step, and later
    ones use momentum, which has then grown since the first layer. The paper has Adam in all layers,
    with a weight decay: ``adam_layers: null``. In the authors' code a norm follows and a second
    residual leads around it, and the inner residual cancels. One step without decay is what remains
    of that in a decoder with norms before its layers, with ``rate`` in place of the norm.
    """

    paper: ClassVar[str] = "Teo and Nguyen 2024 (AdamSMoE)"

    kind: Literal["adam"] = "adam"
    adam_layers: int | None = Field(default=1, ge=1)
    """MoE layers, from the first, that make Adam's step; later ones use momentum. None = all."""
    rate: float = Field(default=0.03, gt=0)
    """Factor on Adam's steps. With the other defaults, the first one has a size of about 3 times
    this in every element."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Part of the first moment that the next MoE layer keeps."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Part of the second moment that the next MoE layer keeps."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the second moment inside the root."""
    decay: float = Field(default=0.0, ge=0, le=1)
    """Part of the residual stream that each of Adam's steps takes away (the paper's kappa)."""
    mu: float = Field(default=0.7, ge=0, lt=1)
    """Part of the momentum that the next MoE layer keeps."""
    gamma: float = Field(default=1.0, gt=0)
    """Factor on the experts' output in the momentum."""

    def join(self, x_TD: Tensor, y_TD: Tensor, state: State, place: Place) -> tuple[Tensor, State]:
        """Make Adam's step or add the momentum. The state is m, p, v, without those not needed."""
        num_m = self._num_momentum()
        kept: State = (pushed(state, y_TD, self.mu, self.gamma),) if num_m else ()
        if not self._is_adam(place):
            return (x_TD + kept[0]).to(x_TD.dtype), kept
        y_TD = wide(y_TD)
        p_TD, v_TD = (1 - self.beta1) * y_TD, (1 - self.beta2) * (y_TD * y_TD)
        if state:
            p_TD, v_TD = self.beta1 * state[num_m] + p_TD, self.beta2 * state[num_m + 1] + v_TD
        step_TD = self.rate * (p_TD / torch.sqrt(v_TD + self.epsilon))
        joined_TD = ((1 - self.decay) * wide(x_TD) + step_TD).to(x_TD.dtype)
        continues = self._is_adam(replace(place, index=place.index + 1))
        return joined_TD, (*kept, p_TD, v_TD) if continues else kept

    def num_carried(self, place: Place) -> int:
        """Return the number of m, p and v that are needed at ``place``."""
        if place.index == 0:
            return 0
        return self._num_momentum() + 2 * self._is_adam(place)

    def _is_adam(self, place: Place) -> bool:
        return self.adam_layers is None or place.index < self.adam_layers

    def _num_momentum(self) -> int:
        """Return whether a momentum is carried: some layer may use it."""
        return int(self.adam_layers is not None)
